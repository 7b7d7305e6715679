/* The spectral density at one step: its own axis; the sample nearest to the cursor. */
class DensityChart extends Chart {
  get domain() { return [0, 1]; }
  listen() {}
  refresh() {}

  sample() {
    const samples = DATA.density.samples;
    if (cursor === null) return this.last || samples[samples.length - 1];
    return this.last = samples.reduce((p, q) => Math.abs(q.step - cursor) < Math.abs(p.step - cursor) ? q : p);
  }

  render() {
    this.stale = false;
    const g = this.size(), D = DATA.density, s = this.shown = this.sample(), scale = symmetric(D.c);
    const f0 = scale.f(D.grid[0]), f1 = scale.f(D.grid[D.grid.length - 1]), inner = g.h - g.t - g.b, base = g.t + inner;
    const X = x => g.l + (scale.f(x) - f0) / (f1 - f0) * (g.w - g.l - g.r);
    const Y = d => base - Math.max(0, Math.min(1, (Math.log10(Math.max(1e-9, d)) + 4) / 5.5)) * inner;
    const svg = svgNode('svg', { viewBox: `0 0 ${g.w} ${g.h}`, width: g.w, height: g.h, 'aria-hidden': 'true' });
    for (const e of [-4, -3, -2, -1, 0, 1]) {
      const y = Math.round(Y(10 ** e)) + .5;
      svg.append(svgNode('line', { class: 'grid', x1: g.l, x2: g.w - g.r, y1: y, y2: y }));
      if (e % 2 === 0) svg.append(svgNode('text', { x: g.l - 8, y: y + 4, 'text-anchor': 'end' }, e ? '10' + superscript(e) : '1'));
    }
    svg.append(svgNode('line', { class: 'axis', x1: g.l, x2: g.w - g.r, y1: base + .5, y2: base + .5 }));
    let edge = -99;
    for (const [v, text] of scale.ticks(D.grid[0], D.grid[D.grid.length - 1]).sort((p, q) => p[0] - q[0])) {
      const x = X(v);
      svg.append(svgNode('line', { class: 'axis', x1: x, x2: x, y1: base, y2: base + 4 }));
      if (x - edge < 34) continue;
      edge = x;
      svg.append(svgNode('text', { x, y: base + 18, 'text-anchor': 'middle' }, text));
    }
    svg.append(svgNode('text', { x: g.l - 12, y: base + 18, 'text-anchor': 'end' }, g.narrow ? 'λ' : 'eigenvalue'));
    let up = '', down = '', middle = '';
    D.grid.forEach((v, i) => {
      const x = X(v);
      up += move(i, x, Y(s.hi[i])); down = move(true, x, Y(s.lo[i])) + down; middle += move(i, x, Y(s.mean[i]));
    });
    svg.append(svgNode('path', { class: 'band f-s1', d: up + down + 'Z' }), svgNode('path', { class: 'line c-s1', d: middle }));
    if (s.limit !== null && s.limit <= D.grid[D.grid.length - 1]) {
      const x = Math.round(X(s.limit)) + .5;
      svg.append(svgNode('line', { class: 'line c-limit dash', x1: x, x2: x, y1: g.t, y2: base }),
        svgNode('text', { class: 'note-text', x: x - 6, y: g.t + 10, 'text-anchor': 'end' }, 'threshold ' + number(s.limit)));
    }
    if (s.top !== null) svg.append(svgNode('line', { class: 'whisker c-loss', x1: X(s.top), x2: X(s.top), y1: base - 7, y2: base }));
    this.plot.replaceChildren(svg);
    this.where.textContent = `sampled at step ${integer(s.step)}${s.says}`;
  }

  point() { if ((this.visible || printing) && (this.stale || this.sample() !== this.shown)) this.render(); }
}
