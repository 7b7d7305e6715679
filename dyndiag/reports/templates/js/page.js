/* The page around the charts: zoom buttons, colour scheme, contents list, printing. */
for (const needing of document.querySelectorAll('.goto, .modes')) needing.hidden = false;
for (const figure of document.querySelectorAll('figure[data-chart]')) {
  const spec = DATA.charts[figure.dataset.chart];
  if (spec.kind === 'density') new DensityChart(figure, spec); else new Chart(figure, spec);
}

const again = () => { for (const chart of charts) { chart.stale = true; if (chart.visible || printing) chart.render(); } };
let width = innerWidth, resizing;
addEventListener('resize', () => {
  if (innerWidth === width) return;
  width = innerWidth;
  clearTimeout(resizing);
  resizing = setTimeout(again, 80);
});
addEventListener('beforeprint', () => {  // 180 mm, findings' charts half of it
  for (const chart of charts) { printing = chart.spec.window ? 340 : 680; chart.stale = true; chart.render(); }
});
addEventListener('afterprint', () => { printing = 0; again(); });

for (const button of document.querySelectorAll('[data-zoom]')) {
  button.addEventListener('click', () => {
    const [a, b] = button.dataset.zoom.split(',').map(Number), chapter = document.getElementById(button.dataset.to);
    setView(a, b);
    if (chapter) chapter.scrollIntoView({ block: 'start' });
  });
}
addEventListener('keydown', event => { if (event.key === 'Escape' && !isWhole()) setView(FIRST, LAST); });

const modes = document.querySelectorAll('[data-mode]');
for (const button of modes) {
  button.addEventListener('click', () => {
    const mode = button.dataset.mode;
    if (mode === 'auto') document.documentElement.removeAttribute('data-theme');
    else document.documentElement.setAttribute('data-theme', mode);
    for (const other of modes) other.setAttribute('aria-pressed', String(other === button));
  });
}

const entries = [...document.querySelectorAll('.rail a')];
const chapters = entries.map(entry => document.querySelector(entry.getAttribute('href')));
const follow = () => {
  let current = 0;
  chapters.forEach((chapter, i) => { if (chapter && chapter.getBoundingClientRect().top < 160) current = i; });
  entries.forEach((entry, i) => i === current ? entry.setAttribute('aria-current', 'true') : entry.removeAttribute('aria-current'));
};
let following = 0;
addEventListener('scroll', () => {
  if (!following) following = requestAnimationFrame(() => { following = 0; follow(); });
}, { passive: true });
follow();
