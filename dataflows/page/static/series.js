// Readings of the status over the last minutes, and what two of them say together. No DOM here.

export const HISTORY_S = 120;
export const WINDOW_S = 10;
export const MIX_S = 60;
export const LEVEL_S = 3;

/** Sum a nested count by its inner key: {topic: {outcome: n}} → {outcome: n}. */
export function totals(byTopic) {
  const sum = {};
  for (const outcomes of Object.values(byTopic))
    for (const [name, n] of Object.entries(outcomes)) sum[name] = (sum[name] ?? 0) + n;
  return sum;
}

export function difference(now, then) {
  return Object.fromEntries(Object.entries(now).map(([name, n]) => [name, n - (then[name] ?? 0)]));
}

/**
 * A percentile, q of 0 to 1, of what was counted between two latency readings, in s: linear within
 * its bucket, as Prometheus does it. Infinity above the last bound; null if nothing was counted.
 */
export function percentile(now, then, q) {
  if (!now) return null;
  const counts = now.cumulative.map((n, i) => n - (then ? then.cumulative[i] : 0));
  const all = counts.at(-1);
  if (!(all > 0)) return null;
  const rank = q * all;
  const bucket = counts.findIndex((n) => n >= rank && n > 0);
  if (bucket === now.bounds_s.length) return Infinity;
  const low = bucket ? now.bounds_s[bucket - 1] : 0;
  const below = bucket ? counts[bucket - 1] : 0;
  return low + (now.bounds_s[bucket] - low) * ((rank - below) / (counts[bucket] - below));
}

const sum = (values) => values.reduce((a, b) => a + b, 0);
const known = (values) => values.filter((x) => x !== null && x !== undefined);
const lagRecords = (status) => {
  const lags = known(status.partitions.map((p) => p.records));
  return lags.length ? sum(lags) : null;
};

export class Series {
  readings = [];
  points = [];

  /** Take a reading; the same one again is passed over. */
  add(status) {
    const last = this.readings.at(-1);
    if (last && status.time === last.time) return;
    if (last && (status.time < last.time || status.started !== last.started || this.#fell(last, status)))
      this.readings = this.points = []; // a new process, or a clock set back
    this.readings = [...this.readings, status].filter((r) => r.time >= status.time - HISTORY_S - 1);
    const previous = this.readings.at(-2);
    if (!previous) return;
    const seconds = status.time - previous.time;
    const rate = (outcome) =>
      ((totals(status.events)[outcome] ?? 0) - (totals(previous.events)[outcome] ?? 0)) / seconds;
    const busy = status.worker_busy_s === null ? null : (status.worker_busy_s - previous.worker_busy_s) / seconds;
    this.points = [
      ...this.points,
      {
        time: status.time,
        in: rate("read"),
        out: rate("scored"),
        p99: percentile(status.latency, this.since(WINDOW_S)?.latency, 0.99),
        lag: lagRecords(status),
        busy: busy === null ? null : Math.min(Math.max(busy, 0), 1),
      },
    ].filter((p) => p.time >= status.time - HISTORY_S);
  }

  #fell(last, status) {
    return (totals(status.events).read ?? 0) < (totals(last.events).read ?? 0);
  }

  get now() {
    return this.readings.at(-1);
  }

  /** The youngest reading that is at least so old, or else the oldest; none if there is but one. */
  since(seconds) {
    if (this.readings.length < 2) return undefined;
    const until = this.now.time - seconds + 0.05; // timers are late by some ms
    return this.readings.findLast((r) => r.time <= until) ?? this.readings[0];
  }

  /** What happened in the last seconds: rates, percentiles, times; null where not known. */
  window(seconds) {
    const [now, then] = [this.now, this.since(seconds)];
    if (!then) return null;
    const length = now.time - then.time;
    const events = difference(totals(now.events), totals(then.events));
    const batches = now.batches - then.batches;
    const batchEvents = now.batch_events - then.batch_events;
    const perSecond = (name) => (now[name] === null || then[name] === null ? null : (now[name] - then[name]) / length);
    const before = Object.fromEntries(then.stages.map((s) => [s.name, s.seconds]));
    return {
      seconds: length,
      in: (events.read ?? 0) / length,
      out: (events.scored ?? 0) / length,
      events,
      decisions: difference(now.decisions, then.decisions),
      modes: difference(now.score_modes, then.score_modes),
      batch: batches > 0 ? batchEvents / batches : null,
      busy: perSecond("worker_busy_s"),
      throttled: perSecond("throttled_s"),
      percentiles: [0.5, 0.95, 0.99, 0.999].map((q) => percentile(now.latency, then.latency, q)),
      stages: now.stages.map((s) => ({
        name: s.name,
        us: batchEvents > 0 ? ((s.seconds - (before[s.name] ?? 0)) * 1e6) / batchEvents : null,
      })),
    };
  }

  /** Whether events were not scored in full in the last seconds, though the level was 0 in them. */
  get late() {
    const then = this.since(LEVEL_S);
    if (!then) return false;
    const these = this.readings.slice(this.readings.indexOf(then));
    if (these.some((reading) => reading.overload_level !== 0)) return false;
    const { full, ...others } = difference(this.now.score_modes, then.score_modes);
    return sum(Object.values(others)) > 0;
  }

  get lag() {
    return lagRecords(this.now);
  }

  get lagSeconds() {
    const ages = known(this.now.partitions.map((p) => p.seconds));
    return ages.length ? Math.max(...ages) : null;
  }
}
