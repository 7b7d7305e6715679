/* What stands in a caption: swatches, statuses, and the value under the cursor. */
const STATUS = { c: 'certified', p: 'provisional', o: 'not converged' };

const statusMark = (status, colour) => {
  const svg = svgNode('svg', { width: 12, height: 12, 'aria-hidden': 'true' });
  if (status === 'c') {
    svg.append(svgNode('line', { class: `whisker c-${colour}`, x1: 6, x2: 6, y1: 0, y2: 12 }),
      svgNode('circle', { class: `solid f-${colour}`, cx: 6, cy: 6, r: 3 }));
  } else if (status === 'p') svg.append(svgNode('circle', { class: `hollow c-${colour}`, cx: 6, cy: 6, r: 3 }));
  else svg.append(svgNode('path', { class: `cross c-${colour}`, d: 'M3 3L9 9M9 3L3 9' }));
  return svg;
};

const swatch = mark => {
  const svg = svgNode('svg', { width: 18, height: 10, 'aria-hidden': 'true' });
  if (mark.type === 'band') svg.append(svgNode('rect', { class: `band f-${mark.cls}`, x: 0, y: 1, width: 18, height: 8 }));
  const dash = mark.dash === undefined && (mark.type === 'rule' || mark.type === 'steps') ? 'dash' : mark.dash || '';
  svg.append(svgNode('line', { class: `line c-${mark.cls} ${dash}`, x1: 0, x2: 18, y1: 5, y2: 5 }));
  return svg;
};

const heatKey = mark => {
  const svg = svgNode('svg', { width: 108, height: 10, role: 'img', 'aria-label': 'light is small, dark is large' });
  for (let i = 0; i < 9; i++) svg.append(svgNode('rect', { class: 'h' + i, x: 12 * i, width: 12, height: 10 }));
  return node('span', {}, '≤ ' + number(10 ** mark.lo, 2), svg, '≥ ' + number(10 ** mark.hi, 2));
};

const reading = (mark, x) => {
  const format = FORMATS[mark.fmt || 'number'];
  if (mark.type === 'rule') return format(mark.y);
  const s = seriesOf(mark.series);
  if (!s.n) return 'not measured';
  if (mark.type === 'steps') return x < s.at(0) ? 'not measured' : format(s.v[s.last(x)]);
  const i = s.nearest(x), at = s.at(i), sampled = at === x ? '' : `, at ${integer(at)}`;
  const gap = s.breaks.has(at < x ? i + 1 : i);
  if (at !== x && gap && mark.type !== 'est') return 'not measured';
  if (mark.type !== 'est' && mark.type !== 'band') return format(s.v[i]) + sampled;
  let digits = 3;
  while (digits < 6 && format(s.lo[i], digits) === format(s.hi[i], digits)) digits++;
  const interval = s.hi[i] - s.lo[i] > 0 ? ` (${format(s.lo[i], digits)} to ${format(s.hi[i], digits)})` : '';
  const status = mark.type === 'est' ? `, ${STATUS[s.status[i]]}` : '';
  return format(s.v[i], digits) + interval + status + sampled;
};
