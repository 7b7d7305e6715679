/* Scales: a monotone function and its ticks. */
const linearTicks = (a, b, want) => {
  const raw = (b - a) / Math.max(1, want), power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map(k => k * power).find(s => s >= raw * .999) || 10 * power;
  const at = [];
  for (let k = Math.ceil(a / step - 1e-9); k * step <= b + step * 1e-9; k++) at.push(k * step);
  return { at, step };
};
const stepTicks = (a, b, want) => {
  const ticks = linearTicks(a, b, want).at.filter(Number.isInteger);
  return ticks.length ? ticks : [Math.ceil(a)];
};

const linear = {
  f: x => x,
  ticks: (a, b, height) => {
    const { at, step } = linearTicks(a, b, Math.max(height > 64 ? 4 : 3, Math.min(6, height / 34)));
    return at.map(x => [x, tickText(x, step)]);
  },
};
const logarithmic = {
  f: x => Math.log10(x),
  ticks: (a, b, height) => {
    const span = Math.log10(b / a), out = [];
    if (span < .35) return linear.ticks(a, b, height);
    const within = span < .9 ? [1, 1.5, 2, 3, 4, 5, 7] : span < 2.2 ? [1, 2, 5] : [1];
    const skip = Math.max(1, Math.ceil(span / Math.max(2, height / 26)));
    const powers = [];
    for (let e = Math.ceil(Math.log10(a * .9999)); 10 ** e <= b * 1.0001; e++) powers.push(e);
    const every = k => powers.filter(e => !((e + k) % skip));
    const few = [every(0), every(1), powers].find(found => found.length > 1) || powers;
    const decades = [Math.floor(Math.log10(a)), ...powers];
    for (const e of span < 2.2 ? decades : few) {
      for (const m of within) {
        const x = m * 10 ** e;
        if (x >= a * .9999 && x <= b * 1.0001) out.push([x, tickText(x)]);
      }
    }
    return out;
  },
};
const symmetric = c => ({
  f: x => Math.asinh(x / c) / Math.LN10,
  ticks: (a, b) => {
    const out = [[0, '0']];
    for (let e = Math.ceil(Math.log10(c)); e < Math.log10(c) + 12; e++) {
      for (const x of [10 ** e, -(10 ** e)]) if (x >= a && x <= b) out.push([x, tickText(x)]);
    }
    return out;
  },
});
const scaleOf = y => y.type === 'symlog' ? symmetric(y.c) : y.type === 'log' ? logarithmic : linear;
