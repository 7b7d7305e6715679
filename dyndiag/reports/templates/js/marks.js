/* Marks: each draws itself into the clipped body of a chart. */
const move = (pen, x, y) => `${pen ? 'L' : 'M'}${x.toFixed(1)} ${y.toFixed(1)}`;

/* A line through values[first … last]: every point while there is room, else the first, smallest
   and largest of each pixel column. Gaps and non-finite values lift the pen. */
const linePath = (chart, s, values) => {
  const [a, b] = chart.domain, from = Math.max(0, s.lower(a) - 1), to = Math.min(s.n - 1, s.lower(b) + 1);
  const log = chart.spec.y.type === 'log', ok = y => Number.isFinite(y) && (!log || y > 0);
  let d = '', pen = false;
  if (to - from < 2 * (chart.g.w - chart.g.l - chart.g.r)) {
    for (let i = from; i <= to; i++) {
      if (s.breaks.has(i)) pen = false;
      if (!ok(values[i])) { pen = false; continue; }
      const alone = !pen && (i === to || s.breaks.has(i + 1) || !ok(values[i + 1]));
      d += move(pen, chart.X(s.at(i)), chart.Y(values[i])) + (alone ? 'h.1' : '');
      pen = true;
    }
    return d;
  }
  let column = null, x = 0, lo = 0, hi = 0, end = 0;
  const flush = () => {
    if (hi > lo) d += move(true, x, chart.Y(lo)) + move(true, x, chart.Y(hi)) + move(true, x, chart.Y(end));
  };
  for (let i = from; i <= to; i++) {
    if (s.breaks.has(i)) pen = false;
    if (!ok(values[i])) { pen = false; continue; }
    const px = Math.floor(chart.X(s.at(i)));
    if (px !== column || !pen) {
      if (column !== null) flush();
      column = px; x = px + .5; lo = hi = end = values[i];
      d += move(pen, x, chart.Y(lo)) + (pen ? '' : 'h.1');
      pen = true;
    } else { end = values[i]; if (end < lo) lo = end; if (end > hi) hi = end; }
  }
  if (column !== null) flush();
  return d;
};

const bandPath = (chart, s, index) => {
  let up = '', down = '';
  for (const i of index) {
    const x = chart.X(s.at(i));
    up += move(up, x, chart.Y(s.hi[i]));
    down = move(true, x, chart.Y(s.lo[i])) + down;
  }
  return up + down + 'Z';
};

/* Runs of neighbouring indices that `belongs`, cut at gaps. */
const runsOf = (s, from, to, belongs) => {
  const runs = [];
  let run = [];
  for (let i = from; i <= to + 1; i++) {
    const inside = i <= to && belongs(i);
    if (run.length && (!inside || s.breaks.has(i))) { runs.push(run); run = []; }
    if (inside) run.push(i);
  }
  return runs;
};
const visible = (chart, s) => {
  const [a, b] = chart.domain;
  return [Math.max(0, s.lower(a) - 1), Math.min(s.n - 1, s.lower(b) + 1)];
};
const brokenMarks = (chart, s, body) => {  // where the value was not a number
  const [from, to] = visible(chart, s), [a, b] = chart.domain;
  let last = -9;
  for (let i = from; i <= to; i++) {
    if (Number.isFinite(s.v[i]) || s.at(i) < a || s.at(i) > b) continue;
    const x = chart.X(s.at(i));
    if (x - last < 6) continue;
    last = x;
    body.append(svgNode('path', { class: 'broken', d: `M${x - 3} ${chart.g.t}l6 6m0 -6l-6 6` }, svgNode('title', {}, number(s.v[i]))));
  }
};

const DRAW = {
  line(chart, mark, body) {
    const s = seriesOf(mark.series);
    if (mark.smooth) {
      const median = seriesOf(mark.smooth);
      if (!mark.dash) body.append(svgNode('path', { class: `line thin c-${mark.cls}`, d: linePath(chart, s, s.v) }));
      body.append(svgNode('path', { class: `line c-${mark.cls} ${mark.dash || ''}`, d: linePath(chart, median, median.v) }));
    } else body.append(svgNode('path', { class: `line c-${mark.cls} ${mark.dash || ''}`, d: linePath(chart, s, s.v) }));
    if (mark.dots && s.n < 200) {
      for (let i = 0; i < s.n; i++) if (Number.isFinite(s.v[i])) body.append(svgNode('circle', { class: `solid f-${mark.cls}`, cx: chart.X(s.at(i)), cy: chart.Y(s.v[i]), r: 1.8 }));
    }
    brokenMarks(chart, s, body);
  },

  steps(chart, mark, body) {
    const s = seriesOf(mark.series), [from, to] = visible(chart, s);
    const log = chart.spec.y.type === 'log';
    let d = '', pen = false;
    for (let i = from; i <= to; i++) {
      if (!Number.isFinite(s.v[i]) || (log && s.v[i] <= 0)) { pen = false; continue; }
      const x = chart.X(s.at(i)), y = chart.Y(s.v[i]);
      d += pen ? `H${x.toFixed(1)}V${y.toFixed(1)}` : move(false, x, y);
      pen = true;
    }
    if (pen && to === s.n - 1) d += `H${chart.X(mark.hi).toFixed(1)}`;  // as long as the last one holds
    body.append(svgNode('path', { class: `line c-${mark.cls} ${mark.dash === undefined ? 'dash' : mark.dash}`, d }));
  },

  rule(chart, mark, body) {
    const y = Math.round(chart.Y(mark.y)) + .5, g = chart.g;
    body.append(svgNode('line', { class: `line c-${mark.cls} ${mark.dash === undefined ? 'dash' : mark.dash}`, x1: g.l, x2: g.w - g.r, y1: y, y2: y }));
  },

  band(chart, mark, body) {
    const s = seriesOf(mark.series), [from, to] = visible(chart, s);
    for (const run of runsOf(s, from, to, i => Number.isFinite(s.lo[i]) && Number.isFinite(s.hi[i]))) {
      const skip = Math.max(1, Math.floor(run.length / 900));
      body.append(svgNode('path', { class: `band f-${mark.cls}`, d: bandPath(chart, s, run.filter((_, k) => k % skip === 0)) }));
    }
    body.append(svgNode('path', { class: `line c-${mark.cls}`, d: linePath(chart, s, s.v) }));
    if (s.n < 60) for (let i = from; i <= to; i++) body.append(svgNode('circle', { class: `solid f-${mark.cls}`, cx: chart.X(s.at(i)), cy: chart.Y(s.v[i]), r: 2.2 }));
  },

  est(chart, mark, body) {
    const s = seriesOf(mark.series), [from, to] = visible(chart, s), cls = mark.cls;
    body.append(svgNode('path', { class: `line hair c-${cls}`, d: linePath(chart, s, s.v) }));
    for (const run of runsOf(s, from, to, i => s.status[i] === 'c')) {
      if (run.length > 1) body.append(svgNode('path', { class: `band f-${cls}`, d: bandPath(chart, s, run) }));
    }
    const room = (chart.g.w - chart.g.l - chart.g.r) / Math.max(1, to - from + 1);
    if (room < 1) return;
    const r = room < 4 ? 1.5 : room < 8 ? 2 : 2.8, log = chart.spec.y.type === 'log';
    for (let i = from; i <= to; i++) {
      if (!Number.isFinite(s.v[i]) || (log && s.v[i] <= 0)) continue;
      const x = chart.X(s.at(i)), y = chart.Y(s.v[i]), top = chart.Y(s.hi[i]), bottom = chart.Y(log ? Math.max(s.lo[i], s.v[i] / 1e3) : s.lo[i]);
      if (Math.abs(top - bottom) > 1) body.append(svgNode('path', { class: `whisker c-${cls} ${s.status[i] === 'c' ? '' : 'dot'}`, d: `M${x.toFixed(1)} ${top.toFixed(1)}V${bottom.toFixed(1)}` }));
      if (s.status[i] === 'c') body.append(svgNode('circle', { class: `solid f-${cls}`, cx: x.toFixed(1), cy: y.toFixed(1), r }));
      else if (s.status[i] === 'p') body.append(svgNode('circle', { class: `hollow c-${cls}`, cx: x.toFixed(1), cy: y.toFixed(1), r: r + .2 }));
      else { const q = r + .6; body.append(svgNode('path', { class: `cross c-${cls}`, d: `M${x - q} ${y - q}l${2 * q} ${2 * q}m0 ${-2 * q}l${-2 * q} ${2 * q}` })); }
    }
  },

  points(chart, mark, body) {
    const [a, b] = chart.domain;
    for (const [x, y] of mark.at) if (x >= a && x <= b) body.append(svgNode('circle', { class: `hollow c-${mark.cls}`, cx: chart.X(x), cy: chart.Y(y), r: 4 }));
  },

  rows(chart, mark, body, svg) {
    const g = chart.g, [a, b] = chart.domain, width = g.w - g.l - g.r;
    const columns = Math.max(1, Math.min(Math.floor(width / 3), Math.ceil(b - a))), wide = width / columns;
    const paths = Array(9).fill('');
    mark.rows.forEach((row, j) => {
      const s = seriesOf(row.series), y = g.t + j * g.row, most = g.l > 120 ? 24 : g.narrow ? 12 : 14;
      const name = row.label.length > most ? '…' + row.label.slice(1 - most) : row.label;
      svg.append(svgNode('text', { x: g.l - 8, y: y + g.row / 2 + 4, 'text-anchor': 'end' }, svgNode('title', {}, row.label), name));
      if (!s.n) return;
      const hold = s.n > 1 ? 2.5 * (s.at(s.n - 1) - s.at(0)) / (s.n - 1) : 1;
      for (let k = 0; k < columns; k++) {
        const x0 = a + k * (b - a) / columns, x1 = a + (k + 1) * (b - a) / columns;
        let top = -Infinity;
        for (let i = s.lower(x0); i < s.n && s.at(i) < x1; i++) if (s.v[i] > top) top = s.v[i];
        const before = s.lower(x0) - 1;
        if (top === -Infinity && before >= 0 && x0 - s.at(before) < hold) top = s.v[before];
        if (!(top > -Infinity)) continue;
        const level = top > 0 ? Math.floor((Math.log10(top) - mark.lo) / (mark.hi - mark.lo) * 9) : 0;
        paths[Math.max(0, Math.min(8, level))] += `M${(g.l + k * wide).toFixed(1)} ${y}h${(wide + .3).toFixed(1)}v${g.row - 1}h${(-wide - .3).toFixed(1)}z`;
      }
    });
    paths.forEach((d, level) => d && body.append(svgNode('path', { class: 'cell h' + level, d })));
  },

  /* Half violins; where one would leave the chart it opens to the left, and its neighbour gives way. */
  violins(chart, mark, body) {
    const D = DATA.density, shown = [], g = chart.g, [a, b] = chart.domain, most = g.narrow ? 22 : 44;
    for (const s of D.samples) {
      if (!shown.length || chart.X(s.step) - chart.X(shown[shown.length - 1].step) >= 10) shown.push(s);
    }
    const room = k => k >= 0 && k + 1 < shown.length ? chart.X(shown[k + 1].step) - chart.X(shown[k].step) : most;
    const turned = k => k < shown.length && chart.X(shown[k].step) + Math.min(most, room(k)) > g.w - g.r + 1;
    shown.forEach((s, k) => {
      if (s.step < a || s.step > b) return;
      const x = chart.X(s.step), way = turned(k) ? -1 : 1, gap = way < 0 ? room(k - 1) : room(k);
      const shared = way < 0 || turned(k + 1) ? gap / 2 : gap, w = Math.max(4, Math.min(most, shared - 3));
      let d = move(false, x, chart.Y(D.grid[0]));
      D.grid.forEach((y, i) => {
        const wide = Math.max(0, (Math.log10(Math.max(1e-9, s.mean[i])) + 3.5) / 5);
        d += move(true, x + way * wide * w, chart.Y(y));
      });
      d += move(true, x, chart.Y(D.grid[D.grid.length - 1])) + 'Z';
      body.append(svgNode('path', { class: 'violin f-s1', d }));
      if (s.top !== null) body.append(svgNode('line', { class: 'whisker c-loss', x1: x - way, x2: x + 6 * way, y1: chart.Y(s.top), y2: chart.Y(s.top) }));
    });
  },
};
