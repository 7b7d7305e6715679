/* The report's data: series are decoded when a chart first asks for them. */
const DATA = JSON.parse(document.getElementById('data').textContent);
const FIRST = DATA.first;
const LAST = Math.max(DATA.last, DATA.first + 1);
const EVENTS = DATA.events;

const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0)).buffer;

const stepsOf = s => {
  const gaps = s.u16 ? new Uint16Array(bytes(s.u16)) : s.u32 ? new Uint32Array(bytes(s.u32)) : null;
  if (!gaps) return i => s.from + i;
  const at = new Float64Array(s.n);
  at[0] = s.from;
  for (let i = 1; i < s.n; i++) at[i] = at[i - 1] + gaps[i - 1];
  return i => at[i];
};

const decoded = {};
const seriesOf = name => {
  if (decoded[name]) return decoded[name];
  const s = DATA.series[name], at = stepsOf(s), n = s.n;
  const v = new Float32Array(bytes(s.v));
  const lo = s.lo ? new Float32Array(bytes(s.lo)) : v;
  const hi = s.hi ? new Float32Array(bytes(s.hi)) : v;
  const lower = x => {  // first index with at(i) >= x
    let a = 0, b = n;
    while (a < b) { const m = (a + b) >> 1; if (at(m) < x) a = m + 1; else b = m; }
    return a;
  };
  const nearest = x => {
    const i = Math.min(n - 1, lower(x));
    return i > 0 && Math.abs(at(i - 1) - x) <= Math.abs(at(i) - x) ? i - 1 : i;
  };
  const last = x => {  // last index with at(i) <= x
    const i = lower(x);
    return Math.max(0, i < n && at(i) === x ? i : i - 1);
  };
  return decoded[name] = {
    n, at, v, lo, hi, lower, nearest, last,
    status: s.status || '', breaks: new Set(s.breaks || []), whole: !s.u16 && !s.u32,
  };
};
