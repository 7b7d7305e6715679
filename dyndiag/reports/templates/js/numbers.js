/* Numbers, written as the static text of the page writes them. */
const superscript = n => String(n).replace(/[-0-9]/g, c => c === '-' ? '⁻' : '⁰¹²³⁴⁵⁶⁷⁸⁹'[c]);
const integer = n => (n < 0 ? '−' : '') + Math.abs(Math.round(n)).toLocaleString('en-US');

const number = (x, digits = 3) => {
  if (x === null || x === undefined) return 'not measured';
  if (Number.isNaN(x)) return 'NaN';
  const sign = x < 0 ? '−' : '', size = Math.abs(x);
  if (size === Infinity) return sign + '∞';
  if (size === 0) return '0';
  const [mantissa, power] = size.toExponential(digits - 1).split('e');
  const decimals = Math.max(0, digits - 1 - Number(power));
  if (size >= 1e-3 && Number(power) < 5) return sign + (decimals ? size.toFixed(decimals) : integer(size));
  return `${sign}${mantissa}·10${superscript(Number(power))}`;
};
const percent = x => Number.isFinite(x) ? (100 * x).toFixed(1).replace('-', '−') + ' %' : number(x);
const FORMATS = { number, percent };

const tickText = (x, step) => {
  if (x === 0) return '0';
  const size = Math.abs(x), sign = x < 0 ? '−' : '';
  if (size >= (step ? 1e6 : 1e4) || size < 1e-3) {
    const e = Math.floor(Math.log10(size) + 1e-9), m = size / 10 ** e;
    return `${sign}${Math.abs(m - 1) < 1e-6 ? '' : +m.toPrecision(2) + '·'}10${superscript(e)}`;
  }
  if (size >= 1000) return sign + integer(size);
  const decimals = step ? Math.max(0, -Math.floor(Math.log10(step) + 1e-9)) : 0;
  return sign + (step ? size.toFixed(decimals) : String(+size.toPrecision(3)));
};
