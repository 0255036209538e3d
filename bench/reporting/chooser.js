// Which methods do best within a budget and a KL bound: what bench/reporting/budgets.py (within) and ranking.py do.

function crossing(at, values, limit) {  // where a run first reaches the limit, and how far from both its evaluations
  let before = 0, start = 0;
  for (const [i, value] of values.entries()) {
    if (value === null) continue;
    if (value >= limit) {
      const share = value > before ? Math.min(1, Math.max(0, (limit - before) / (value - before))) : 1;
      return { place: start + share * (at[i] - start), ends: [before, value], limit };
    }
    [before, start] = [value, at[i]];
  }
  return null;
}

function valueAt(run, name, place) {  // linear between evaluations, from the prior on; NaN where not measured
  let before = run.starts[name] ?? 0, start = 0;
  for (const [i, end] of run.at.entries()) {
    const value = run[name][i] ?? NaN;
    if (place <= end) return end > start ? before + (place - start) / (end - start) * (value - before) : value;
    [before, start] = [value, end];
  }
  return NaN;
}

function stop(run, axis, budget, mostKl) {  // the first of budget, KL bound and end
  const end = run.at.at(-1), places = [["budget", crossing(run.at, run[axis], budget)]];
  if (mostKl !== null) places.push(["kl", crossing(run.at, run.kl, mostKl)]);
  let first = { bound: "end", place: end, ends: [Infinity, 0], limit: 1 };
  for (const [bound, found] of places.reverse()) if (found && found.place <= first.place) first = { bound, ...found };
  return first;
}

function probability(t, degrees) {  // of a larger |t|, by Student (Abramowitz and Stegun, 26.7.3 and 26.7.4)
  const angle = Math.atan(Math.abs(t) / Math.sqrt(degrees)), cos = Math.cos(angle), odd = degrees % 2;
  let term = odd ? cos : 1, sum = degrees > 1 ? term : 0;
  for (let k = odd + 2; k < degrees; k += 2) sum += term *= cos * cos * (k - 1) / k;
  return Math.max(0, 1 - (odd ? (angle + Math.sin(angle) * sum) * 2 / Math.PI : Math.sin(angle) * sum));
}

function student(degrees, level) {  // the |t| that is exceeded with this probability
  let low = 0, high = 1e4;
  for (let i = 0; i < 80; i++) {
    const middle = (low + high) / 2;
    [low, high] = probability(middle, degrees) > level ? [middle, high] : [low, middle];
  }
  return low;
}

function centred(values, level) {  // mean, interval, and p of the test that the mean is 0
  const n = values.length, mean = values.reduce((a, b) => a + b, 0) / n;
  if (n < 2) return { ends: [mean, NaN, NaN], p: NaN };
  const error = Math.sqrt(values.reduce((sum, x) => sum + (x - mean) ** 2, 0) / (n - 1) / n);
  const reach = student(n - 1, level) * error;
  return { ends: [mean, mean - reach, mean + reach], p: error > 0 ? probability(mean / error, n - 1) : +(mean === 0) };
}

function holm(values) {  // in the given order
  const order = values.map((_, i) => i).sort((a, b) => values[a] - values[b]), corrected = [];
  let worst = 0;
  order.forEach((i, rank) => corrected[i] = worst = Math.max(worst, Math.min(1, (values.length - rank) * values[i])));
  return corrected;
}

// data: of choices() in bench/reporting/chooser.py. Returns the ranked rows, the best first, and row → why it is none.
export function choose(data, measure, axis, budget, mostKl, gradient) {
  const log = measure.gain ? x => x : Math.log, back = measure.gain ? x => x : Math.exp, sign = measure.gain ? -1 : 1;
  const rows = [], missing = {};
  for (const [name, runs] of Object.entries(data.rows)) {
    if (!gradient && runs.some(run => Math.max(...run.reward_gradients) > 0)) continue;
    const stops = runs.map(run => stop(run, axis, budget, mostKl));
    const far = stops.find(({ ends, limit }) => ends[1] > data.near * limit && ends[0] < limit / data.near);
    if (mostKl !== null && runs.every(run => run.kl.every(kl => kl === null))) missing[name] = "path_kl is not known";
    else if (far) missing[name] = `${far.bound === "kl" ? "path_kl jumps" : "not evaluated"} between ${far.ends.map(short).join(" and ")}`;
    if (name in missing) continue;
    const read = key => runs.map((run, i) => [run.seed, valueAt(run, key, stops[i].place)]).filter(([, x]) => !Number.isNaN(x));
    const values = new Map(read(measure.name).map(([seed, x]) => [seed, log(x)]));
    if (!values.size) continue;
    const centre = key => Math.exp(centred(read(key).map(([, x]) => Math.log(x)), data.level).ends[0]);
    const bounded = stops.some(one => one.bound === "kl");
    const ended = stops.some((one, i) => one.bound === "end" && runs[i][axis].at(-1) < data.enough * budget);
    const ends = centred([...values.values()], data.level).ends.map(back);
    rows.push({ name, values, ends, kl: centre("kl"), spent: centre(axis), bounded, ended });
  }
  rows.sort((a, b) => sign * (a.ends[0] - b.ends[0]));
  const most = Math.max(...rows.map(row => row.values.size)), first = rows.find(row => row.values.size === most);
  const others = rows.filter(row => row !== first);
  for (const row of others) {
    const shared = [...row.values.keys()].filter(seed => first.values.has(seed));
    const { ends, p } = centred(shared.map(seed => row.values.get(seed) - first.values.get(seed)), data.level);
    Object.assign(row, { gap: measure.gain ? ends : ends.map(back), p });  // of a distance a ratio
  }
  const tested = others.filter(row => !Number.isNaN(row.p)), corrected = holm(tested.map(row => row.p));
  tested.forEach((row, i) => row.p = corrected[i]);
  return { rows, first, missing };
}

export function short(x) {
  return Math.abs(x) >= 1000 ? Math.round(x).toLocaleString("en") : String(+x.toPrecision(3));
}

function between(ends, show) {
  return Number.isNaN(ends[1]) ? show(ends[0]) : `${show(ends[0])} [${show(ends[1])}, ${show(ends[2])}]`;
}

function listed(names) {
  return names.length > 6 ? `${names.slice(0, 6).join(", ")} and ${names.length - 6} more` : names.join(", ");
}

// The answer as elements: a sentence, a table, and what is not known.
export function answer(data, measure, axis, budget, mostKl, gradient) {
  const { rows, first, missing } = choose(data, measure, axis.name, budget, mostKl, gradient);
  const make = (tag, text, parent) => parent.appendChild(Object.assign(document.createElement(tag), { textContent: text }));
  const place = document.createDocumentFragment(), signed = x => (x > 0 ? "+" : "") + short(x);
  const show = measure.gain ? signed : short, unit = axis.unit ? "seconds of training" : axis.label;
  const bound = `${short(budget)} ${unit}${mostKl === null ? "" : ` and ${short(mostKl)} nats`}`;
  if (first) {
    const others = rows.filter(row => row !== first), open = others.filter(row => row.p >= data.level), apart = others.filter(row => row.p < data.level);
    const better = apart.filter(row => measure.gain ? row.gap[0] > 0 : row.gap[0] < 1), less = apart.filter(row => !better.includes(row));
    const parts = [`Within ${bound}, ${first.name} ${measure.gain ? "gains most" : "comes closest to the target"}: ${between(first.ends, show)}`];
    if (better.length) parts.push(`significantly ${measure.gain ? "more" : "nearer"}, but of fewer seeds: ${listed(better.map(row => row.name))}`);
    if (open.length) parts.push(`not separated from it: ${listed(open.map(row => row.name))}`);
    if (less.length) parts.push(`${less.length} significantly ${measure.gain ? "less" : "farther"}`);
    if (others.length > open.length + apart.length) parts.push(`${others.length - open.length - apart.length} not tested`);
    const few = Math.min(...rows.map(row => row.values.size));
    make("p", `${parts.join("; ")}.${few < data.few ? ` This rests on ${few === 1 ? "one seed" : `${few} seeds`}.` : ""}`, place).className = "lead";
    const table = place.appendChild(document.createElement("table")), head = make("tr", "", make("thead", "", table));
    const titles = ["method", measure.gain ? `gain of ${measure.name} ↑` : `${measure.name} ↓`, measure.gain ? "less the first's" : "over the first's", "p (Holm)", "path_kl [nats]", unit, "n", "stopped by"];
    for (const title of titles) make("th", title, head).scope = "col";
    const body = make("tbody", "", table);
    for (const row of rows) {
      const line = make("tr", "", body), mark = row === first ? " ★" : row.p >= data.level ? " ≈" : "";
      make("th", row.name, line).scope = "row";
      const by = [row.bounded && "the KL", row.ended && "its end"].filter(Boolean).join(", ") || "the budget";
      const cells = [between(row.ends, show) + mark, row.gap ? between(row.gap, measure.gain ? signed : short) : "–", row.p >= 0 ? row.p < 1e-4 ? "< 0.0001" : short(row.p) : "–", short(row.kl), short(row.spent), row.values.size, by];
      for (const cell of cells) make("td", cell === "NaN" ? "–" : cell, line);
    }
  } else make("p", `Nothing is known of training within ${bound}.`, place).className = "lead";
  for (const { said, each, kl } of data.free) {
    if (each[axis.name] > budget || mostKl !== null && !(kl !== null && kl <= mostKl)) continue;
    make("p", said + (each[axis.name] ? `; ${short(budget)} ${unit} make ${short(Math.floor(budget / each[axis.name]))} samples.` : "."), place);
  }
  const reasons = Object.entries(missing).map(([name, why]) => `${name}: ${why}`);
  if (reasons.length) make("p", `Not ranked: ${reasons.join("; ")}.`, place).className = "notes";
  const failed = Object.entries(data.failed).map(([name, count]) => `${count} of ${name}`);
  if (failed.length) make("p", `Failed runs are left out: ${failed.join(", ")}.`, place).className = "notes";
  if (axis.unit) make("p", `Seconds on: ${data.hardware.join("; ")}.`, place).className = "notes";
  return place;
}
