/* What all charts share: the window of steps, the cursor, and the list of charts. */
const NS = 'http://www.w3.org/2000/svg';
const build = (element, attributes, children) => {
  for (const key in attributes || {}) {
    const value = attributes[key];
    if (value !== undefined && value !== null) element.setAttribute(key, value);
  }
  for (const child of children) if (child !== null && child !== undefined) element.append(child);
  return element;
};
const svgNode = (name, attributes, ...children) =>
  build(document.createElementNS(NS, name), attributes, children);
const node = (name, attributes, ...children) =>
  build(document.createElement(name), attributes, children);

const charts = [];
const spoken = document.getElementById('live');
const pill = document.getElementById('pill');
let view = [FIRST, LAST];
let cursor = null;
let frame = 0;
let printing = 0;  // width while printing

const isWhole = () => view[0] <= FIRST && view[1] >= LAST;
const setView = (a, b) => {
  const least = Math.min(4, LAST - FIRST), middle = (a + b) / 2;
  if (b - a < least) { a = middle - least / 2; b = middle + least / 2; }
  view = [Math.max(FIRST, Math.min(a, LAST - least)), Math.min(LAST, Math.max(b, FIRST + least))];
  pill.hidden = isWhole();
  if (!isWhole()) {
    pill.firstElementChild.textContent = `Steps ${integer(view[0])} to ${integer(view[1])}`;
  }
  for (const chart of charts) chart.refresh();
};
const setCursor = x => {
  cursor = x;
  if (!frame) frame = requestAnimationFrame(() => { frame = 0; for (const c of charts) c.point(); });
};
pill.querySelector('button').addEventListener('click', () => setView(FIRST, LAST));

const near = new IntersectionObserver(entries => {
  for (const entry of entries) {
    const chart = entry.target.chart;
    chart.visible = entry.isIntersecting;
    if (!chart.visible) continue;
    if (chart.stale) chart.render();
    chart.point();
  }
}, { rootMargin: '300px' });
