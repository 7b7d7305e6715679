/* The timeline of events: a bar each, one lane per overlap, its label above. */
const LANE = 27, MOST_LANES = 8;
const ruler = document.createElement('canvas').getContext('2d');

const layLanes = chart => {
  const g = chart.g, ends = [], items = [];
  ruler.font = '550 11.5px ' + getComputedStyle(document.body).fontFamily;
  for (const event of EVENTS) {
    const text = g.narrow ? event.short : event.label, width = ruler.measureText(text).width + 4;
    const x0 = chart.X(event.start), x1 = Math.max(x0 + 3, chart.X(event.end));
    let tx = x0, anchor = 'start';
    if (x0 + width > g.w - 2) { anchor = 'end'; tx = Math.min(g.w - 2, Math.max(width, x1)); }
    const left = Math.min(x0, anchor === 'start' ? tx : tx - width), right = Math.max(x1, anchor === 'start' ? tx + width : tx);
    let row = ends.findIndex(end => end <= left - 12);
    if (row < 0) row = ends.length;
    const bare = row >= MOST_LANES;  // no room left: the bar alone, in the last lane
    if (bare) row = MOST_LANES - 1; else ends[row] = right;
    items.push({ event, row, x0, x1, tx, anchor, text: bare ? '' : text, left, right });
  }
  return { items, rows: Math.max(1, ends.length) };
};

DRAW.lanes = (chart, mark, body, svg) => {
  for (const { event, row, x0, x1, tx, anchor, text, left, right } of chart.lanes.items) {
    const y = row * LANE, until = event.open ? 'and still open' : `to ${integer(event.end)}`;
    const linked = event.finding !== null;
    const group = svgNode('g', linked
      ? { class: 'event', tabindex: 0, role: 'link', 'aria-label': `${event.label}, steps ${integer(event.start)} ${until}. Go to the finding.` }
      : { class: 'event unlinked', role: 'img', 'aria-label': `${event.label}, steps ${integer(event.start)} ${until}` });
    const bar = (x, width, opacity) => svgNode('rect', { class: 'bar e-' + event.colour, x, y: y + 17, width, height: 6, rx: opacity ? 0 : 1.5, opacity });
    const fade = event.open && DATA.live ? Math.min(24, (x1 - x0) / 2) : 0;  // open in a run that goes on: it fades out
    group.append(svgNode('rect', { x: left, y, width: right - left, height: 25, fill: 'transparent' }), bar(x0, Math.max(3, x1 - x0 - fade)));
    if (fade > 2) for (let k = 0; k < 4; k++) group.append(bar(x1 - fade + k * fade / 4, fade / 4, .8 - .2 * k));
    if (text) group.append(svgNode('text', { class: 'event-text', x: tx, y: y + 12, 'text-anchor': anchor }, text));
    for (const step of event.notches) {
      const x = chart.X(step);
      group.append(svgNode('line', { class: 'notch', x1: x, x2: x, y1: y + 15.5, y2: y + 24.5 }));
    }
    if (linked) {
      const go = () => document.getElementById(event.finding).scrollIntoView({ block: 'start' });
      group.addEventListener('click', go);
      group.addEventListener('keydown', key => {
        if (key.key !== 'Enter' && key.key !== ' ') return;
        key.preventDefault(); key.stopPropagation(); go();
      });
    }
    svg.append(group);
  }
};
