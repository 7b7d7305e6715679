/* One chart: its size, its axes, its marks, and what the reader does with it. */
class Chart {
  constructor(figure, spec) {
    this.figure = figure; this.spec = spec; this.marks = spec.marks;
    this.hidden = new Set(); this.stale = true; this.visible = false;
    this.heat = this.marks.find(m => m.type === 'rows');
    this.timeline = this.marks.some(m => m.type === 'lanes');
    this.plot = figure.querySelector('.plot');
    this.plot.tabIndex = 0;
    this.plot.setAttribute('role', 'group');
    this.plot.setAttribute('aria-label', `Chart: ${spec.title}. ${spec.says || ''} Arrow keys move through steps, plus and minus zoom, Escape shows the whole run.`);
    if (!this.timeline) this.plot.style.minHeight = `${this.size().h}px`;
    this.legend();
    this.listen();
    figure.chart = this;
    near.observe(figure);
    charts.push(this);
  }

  get domain() { return this.spec.window || (this.spec.context ? [FIRST, LAST] : view); }

  size() {
    const w = Math.round(printing || this.plot.clientWidth || 900), narrow = w < 560;
    const g = { w, narrow, r: narrow ? 6 : 12, t: 10, b: this.spec.xaxis === false ? 6 : 24 };
    g.l = this.spec.window ? 50 : this.heat ? (narrow ? 86 : 92) : narrow ? 48 : 92;
    g.row = narrow ? 16 : 19;
    g.h = this.heat ? g.t + g.b + this.heat.rows.length * g.row : this.spec.height * (narrow && this.spec.height > 180 ? .86 : 1);
    return g;
  }

  legend() {
    this.out = [];
    const caption = this.figure.querySelector('figcaption');
    if (!caption) return;
    const legend = node('span', { class: 'legend' }), named = this.marks.filter(m => m.label);
    const toggles = named.length > 1 && !this.spec.context;
    const alone = named.length === 1 && named[0].type !== 'est' && this.spec.title.toLowerCase().includes(named[0].label.toLowerCase());
    for (const mark of named) {
      const value = node('b'), label = node('bdi', {}, mark.label);
      if (toggles) {
        const button = node('button', { type: 'button', 'aria-pressed': 'true' }, swatch(mark), label, ' ', value);
        button.addEventListener('click', () => {
          const shown = this.hidden.delete(mark);
          if (!shown) this.hidden.add(mark);
          button.setAttribute('aria-pressed', String(shown));
          this.render();
        });
        legend.append(node('span', {}, button));
      } else legend.append(alone ? node('span', {}, value) : node('span', {}, swatch(mark), label, ' ', value));
      this.out.push([mark, value]);
    }
    const estimates = this.marks.filter(m => m.type === 'est');
    for (const status of this.spec.window ? [] : 'cpo') {
      if (estimates.some(m => seriesOf(m.series).status.includes(status))) legend.append(node('span', { class: 'status' }, statusMark(status, estimates[0].cls), STATUS[status]));
    }
    if (this.heat) legend.append(heatKey(this.heat));
    if (legend.childNodes.length) caption.append(legend);
    this.where = node('span', { class: 'where' });
    caption.append(this.where);
    if (this.spec.window || this.spec.context || this.spec.table === false) return;
    const button = node('button', { class: 'opens', type: 'button', 'aria-expanded': 'false' }, 'Table');
    button.addEventListener('click', () => this.table(button));
    caption.append(button);
  }

  /* Smallest and largest value in the window, with a margin; the spec's own limits for the whole run. */
  extent() {
    const y = this.spec.y, [a, b] = this.domain, log = y.type === 'log';
    let lo = Infinity, hi = -Infinity;
    const take = v => { if (Number.isFinite(v) && (!log || v > 0)) { if (v < lo) lo = v; if (v > hi) hi = v; } };
    for (const mark of this.marks) {
      if (this.hidden.has(mark)) continue;
      if (mark.type === 'rule') { if (mark.include !== false) take(mark.y); continue; }
      if (mark.type === 'points') { for (const [, v] of mark.at) take(v); continue; }
      if (!mark.series) continue;
      const s = seriesOf(mark.series), ranged = mark.type === 'est' || mark.type === 'band';
      if (!s.n) continue;
      if (mark.type === 'steps') take(s.v[s.last(a)]);
      for (let i = s.lower(a); i < s.n && s.at(i) <= b; i++) {
        take(s.v[i]);
        if (ranged && (mark.type === 'band' || s.status[i] !== 'o')) { take(s.hi[i]); if (!log || s.lo[i] > s.v[i] / 1e3) take(s.lo[i]); }
      }
    }
    if (!Number.isFinite(lo)) { lo = log ? .1 : 0; hi = 1; }
    if (log) {
      const margin = Math.max(.03, Math.log10(hi / lo) * .06);
      lo = 10 ** (Math.log10(lo) - margin); hi = 10 ** (Math.log10(hi) + margin);
    } else { const margin = (hi - lo || Math.abs(hi) || 1) * .07; lo -= margin; hi += margin; }
    const fixed = y.hard || (a <= FIRST && b >= LAST && !this.spec.window);
    if (fixed && y.min !== undefined) lo = Math.min(y.min, y.hard ? y.min : lo < y.min ? lo : y.min);
    if (fixed && y.max !== undefined) hi = y.max;
    return [lo, hi];
  }

  refresh() { this.stale = true; if (this.visible || printing) this.render(); }

  render() {
    this.stale = false;
    const g = this.g = this.size(), [a, b] = this.domain;
    this.X = x => g.l + (x - a) / (b - a) * (g.w - g.l - g.r);
    this.inverse = px => a + (px - g.l) / (g.w - g.l - g.r) * (b - a);
    if (this.timeline) { this.lanes = layLanes(this); g.h = this.lanes.rows * LANE + 4; g.t = g.b = 0; }
    const inner = g.h - g.t - g.b, id = 'clip-' + this.spec.id;
    const svg = svgNode('svg', { viewBox: `0 0 ${g.w} ${g.h}`, width: g.w, height: g.h, 'aria-hidden': this.timeline ? null : 'true', focusable: 'false' },
      svgNode('defs', {}, svgNode('clipPath', { id }, svgNode('rect', { x: g.l, y: Math.max(0, g.t - 6), width: g.w - g.l - g.r, height: inner + 8 }))));
    const body = svgNode('g', { 'clip-path': `url(#${id})` });
    if (!this.timeline && !this.heat) this.verticalAxis(svg, inner);
    if (this.spec.xaxis !== false) this.stepAxis(svg, inner);
    if (!this.timeline) this.ribbons(body, inner);
    for (const mark of this.marks) if (!this.hidden.has(mark)) DRAW[mark.type](this, mark, body, svg);
    svg.append(body);
    this.notes(svg);
    this.dimming(svg);
    const from = this.timeline ? 0 : g.t - 4;
    this.line = svgNode('line', { class: 'cursor', y1: from, y2: g.h - g.b, visibility: 'hidden' });
    this.selection = svgNode('rect', { class: 'selection', y: from, height: Math.max(0, g.h - g.b - from), width: 0, visibility: 'hidden' });
    svg.append(this.selection, this.line);
    this.plot.replaceChildren(svg);
    this.point();
  }

  verticalAxis(svg, inner) {
    const g = this.g, y = this.spec.y, scale = scaleOf(y), [lo, hi] = this.extent();
    const f0 = scale.f(lo), f1 = scale.f(hi);
    const under = g.t + inner + 20;  // where a logarithmic axis has no place for a value
    this.Y = v => y.type === 'log' && v <= 0 ? under : g.t + inner - (scale.f(v) - f0) / (f1 - f0) * inner;
    let above = Infinity;
    for (const [v, text] of scale.ticks(lo, hi, inner).sort((p, q) => p[0] - q[0])) {
      const py = this.Y(v), crisp = Math.round(py) + .5;
      if (py < g.t - 1 || py > g.t + inner + 1) continue;
      svg.append(svgNode('line', { class: 'grid', x1: g.l, x2: g.w - g.r, y1: crisp, y2: crisp }));
      if (above - py < 13) continue;
      above = py;
      svg.append(svgNode('text', { x: g.l - 8, y: py + 4, 'text-anchor': 'end' }, y.fmt === 'percent' ? `${+(v * 100).toFixed(1)} %` : text));
    }
  }

  stepAxis(svg, inner) {
    const g = this.g, [a, b] = this.domain, base = g.t + inner;
    svg.append(svgNode('line', { class: 'axis', x1: g.l, x2: g.w - g.r, y1: base + .5, y2: base + .5 }));
    const ticks = stepTicks(a, b, Math.max(2, Math.min(9, (g.w - g.l - g.r) / 95)));
    let edge = -Infinity;
    ticks.forEach((v, k) => {
      const px = this.X(v), text = integer(v), half = text.length * 3.3, crisp = Math.round(px) + .5;
      svg.append(svgNode('line', { class: 'axis', x1: crisp, x2: crisp, y1: base, y2: base + 4 }));
      if (px - half < edge + 8) return;
      const x = Math.max(g.l - 4 + (k ? 0 : half), Math.min(g.w - half - 1, px));
      svg.append(svgNode('text', { x, y: base + 18, 'text-anchor': 'middle' }, text));
      edge = x + half;
    });
    if (g.l > 60 || this.X(ticks[0]) - integer(ticks[0]).length * 3.3 > g.l - 8) svg.append(svgNode('text', { x: g.l - 12, y: base + 18, 'text-anchor': 'end' }, 'step'));
  }

  /* Events as a ribbon on top; a tint only on the timeline and where they are short. */
  ribbons(body, inner) {
    const g = this.g, [a, b] = this.domain;
    for (const event of EVENTS) {
      if (event.end < a || event.start > b) continue;
      const x0 = this.X(Math.max(a, event.start)), width = Math.max(2, this.X(Math.min(b, event.end)) - x0), colour = 'e-' + event.colour;
      body.append(svgNode('rect', { class: 'bar ' + colour, x: x0, y: g.t - 6, width, height: 3 }));
      if (this.spec.context || event.end - event.start < .1 * (b - a)) body.append(svgNode('rect', { class: 'tint ' + colour, x: x0, y: g.t - 3, width, height: inner + 3 }));
    }
    for (const { at } of DATA.switches) {
      if (at < a || at > b) continue;
      const x = Math.round(this.X(at)) + .5;
      body.append(svgNode('line', { class: 'switch', x1: x, x2: x, y1: g.t - 3, y2: g.t + inner }));
    }
  }

  notes(svg) {
    const g = this.g, [a, b] = this.domain;
    for (const note of this.timeline ? [] : this.spec.notes || []) {
      if (note.x < a || note.x > b || (note.wide && g.narrow)) continue;
      let y = note.y === undefined ? g.t + (note.dy || 12) : this.Y(note.y) + (note.dy || 0);
      if (y < g.t + 6) y = this.Y(note.y) + 15;  // no room above: below
      const px = this.X(note.x) + (note.dx || 0), long = note.text.length * 6.2;
      const turn = !note.anchor && px + long > g.w ? 'end' : note.anchor || 'start';
      svg.append(svgNode('text', { class: 'note-text', x: turn === 'end' && px - long < g.l ? Math.min(g.w - 2, g.l + long) : px, y: Math.max(11, y), 'text-anchor': turn }, note.text));
    }
  }

  dimming(svg) {  // the timeline shows the whole run and dims what is outside the window
    if (!this.spec.context || isWhole()) return;
    const g = this.g, x0 = this.X(view[0]), x1 = this.X(view[1]), height = g.h - g.b + 1;
    svg.append(svgNode('rect', { class: 'dim', x: g.l, y: 0, width: Math.max(0, x0 - g.l), height }),
      svgNode('rect', { class: 'dim', x: x1, y: 0, width: Math.max(0, g.w - g.r - x1), height }),
      svgNode('path', { class: 'edge', d: `M${x0} 0V${height}M${x1} 0V${height}` }));
  }

  listen() {
    const plot = this.plot, at = event => { const box = plot.getBoundingClientRect(); return this.inverse((event.clientX - box.left) * this.g.w / box.width); };
    const inside = x => Math.max(this.domain[0], Math.min(this.domain[1], x));
    let from = null;
    plot.addEventListener('pointermove', event => {
      if (!this.g) return;
      const x = inside(at(event));
      setCursor(x);
      if (from === null) return;
      const p = this.X(from), q = this.X(x);
      this.selection.setAttribute('x', Math.min(p, q));
      this.selection.setAttribute('width', Math.abs(p - q));
      this.selection.setAttribute('visibility', 'visible');
    });
    plot.addEventListener('pointerleave', () => { if (from === null) setCursor(null); });
    plot.addEventListener('pointerdown', event => {
      if (!this.g) return;
      if (event.pointerType === 'touch') { setCursor(inside(at(event))); return; }
      if (event.button || this.spec.window || event.target.closest('.event')) return;
      from = inside(at(event));
      plot.setPointerCapture(event.pointerId);
    });
    plot.addEventListener('pointerup', event => {
      if (from === null) return;
      const to = inside(at(event)), start = from, far = Math.abs(this.X(to) - this.X(start));
      from = null;
      this.selection.setAttribute('visibility', 'hidden');
      if (far > 5) setView(Math.min(start, to), Math.max(start, to));
    });
    plot.addEventListener('pointercancel', () => { from = null; this.selection.setAttribute('visibility', 'hidden'); });
    plot.addEventListener('dblclick', () => setView(FIRST, LAST));
    plot.addEventListener('keydown', event => this.key(event));
    plot.addEventListener('blur', () => setCursor(null));
  }

  key(event) {
    const [a, b] = this.domain, stride = Math.max(1, Math.round((b - a) / (event.shiftKey ? 12 : 200)));
    const middle = cursor === null ? (view[0] + view[1]) / 2 : cursor, half = (view[1] - view[0]) / 2;
    let x = cursor === null ? a : cursor;
    if (event.key === 'ArrowRight') x = Math.min(b, Math.round(x) + stride);
    else if (event.key === 'ArrowLeft') x = Math.max(a, Math.round(x) - stride);
    else if (event.key === 'Home') x = a;
    else if (event.key === 'End') x = b;
    else if (event.key === '+' || event.key === '=') { event.preventDefault(); setView(middle - half / 2, middle + half / 2); return; }
    else if (event.key === '-') { event.preventDefault(); setView(middle - half * 2, middle + half * 2); return; }
    else if (event.key === 'Escape') { setView(FIRST, LAST); setCursor(null); return; }
    else return;
    event.preventDefault();
    setCursor(x);
    clearTimeout(this.saying);
    this.saying = setTimeout(() => {
      spoken.textContent = `Step ${integer(x)}: ` + this.out.map(([mark]) => `${mark.label} ${reading(mark, Math.round(x))}`).join(', ');
    }, 250);
  }

  point() {
    if (!this.visible && !printing) return;
    const [a, b] = this.domain, on = cursor !== null && cursor >= a && cursor <= b, x = on ? Math.round(cursor) : null;
    if (this.line && this.X) {
      if (on) { const px = Math.round(this.X(x)) + .5; this.line.setAttribute('x1', px); this.line.setAttribute('x2', px); }
      this.line.setAttribute('visibility', on ? 'visible' : 'hidden');
    }
    if (!this.where) return;
    const caption = this.where.parentNode;
    if (on && !caption.classList.contains('reading')) { caption.style.height = `${caption.getBoundingClientRect().height}px`; caption.classList.add('reading'); }
    else if (!on && caption.classList.contains('reading')) { caption.classList.remove('reading'); caption.style.height = ''; }
    this.where.textContent = on ? 'step ' + integer(x) : '';
    for (const [mark, value] of this.out) {
      const text = on ? reading(mark, x) : '';
      if (value.textContent !== text) value.textContent = text;
    }
  }

  table(button) {  // about 25 rows of the window
    const open = this.figure.querySelector('.values');
    button.setAttribute('aria-expanded', String(!open));
    if (open) { open.remove(); return; }
    const [a, b] = this.domain, named = this.heat ? this.heat.rows.map(r => ({ type: 'line', ...r })) : this.marks.filter(m => m.label && (m.series || m.type === 'rule'));
    const lead = named.find(m => m.type === 'est') || named.find(m => m.series), s = seriesOf(lead.series), at = [];
    for (let i = s.lower(a); i < s.n && s.at(i) <= b; i++) at.push(s.at(i));
    const skip = Math.max(1, Math.ceil(at.length / 25)), rows = at.filter((_, i) => i % skip === 0);
    const cell = (tag, text) => node(tag, tag === 'th' ? { class: 'n', scope: 'col' } : { class: 'n' }, text);
    const table = node('table', {},
      node('thead', {}, node('tr', {}, cell('th', 'step'), ...named.map(m => cell('th', m.label)))),
      node('tbody', {}, ...rows.map(x => node('tr', {}, cell('td', integer(x)), ...named.map(m => cell('td', reading(m, x)))))));
    this.figure.append(node('div', { class: 'values', tabindex: '0', role: 'region', 'aria-label': 'Data of ' + this.spec.title }, table));
  }
}
