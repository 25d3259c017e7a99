// The list of flagged transactions: filtered, held while somebody is in it, and each as a whole.

import { byId, el, say, signedBar, bar } from "./draw.js";
import * as words from "./words.js";

const PAGE = 50;

export class Flagged {
  #get;
  #announce;
  #shown = []; // the records in the table
  #found = null; // the newest answer
  #life = null; // when the process started: numbers begin anew in the next one
  #foundIn = null; // the life that #found is of
  #shownIn = null; // and #shown
  #limit = PAGE;
  #asked = 0; // counts questions, so that a late answer to an old one is dropped
  #byHand = false; // whether the question under way was

  constructor({ get, announce }) {
    this.#get = get;
    this.#announce = announce;
    const form = byId("filter");
    let typing = 0;
    const changed = (wait) => {
      clearTimeout(typing);
      typing = setTimeout(() => this.#ask(true), wait);
    };
    form.addEventListener("input", () => changed(250));
    form.addEventListener("reset", () => changed(0));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      changed(0);
    });
    byId("newer").addEventListener("click", () => {
      this.#render();
      byId("rows").querySelector("button")?.focus();
    });
    byId("more").addEventListener("click", () => this.#more());
    byId("rows").addEventListener("click", (event) => {
      const row = event.target.closest("tr");
      const record = row && this.#shown.find((r) => String(r.number) === row.dataset.number);
      if (record && !String(getSelection())) this.#open(record);
    });
    byId("record-close").addEventListener("click", () => byId("record").close());
    byId("record").addEventListener("click", (event) => {
      if (event.target === byId("record")) byId("record").close(); // beside the box
    });
  }

  /** Ask for what is new; what is being read stays where it is. */
  async refresh(life) {
    this.#life = life;
    await this.#ask(false);
  }

  /** What is asked for: an id as a whole if it is in quotes, or else how it begins. */
  get #filter() {
    const form = byId("filter");
    const asked = {};
    for (const field of ["card", "terminal"]) {
      const typed = form[field].value.trim();
      const quoted = /^"(.+)"$/.exec(typed);
      if (quoted) asked[field] = quoted[1];
      else if (typed) asked[`${field}_prefix`] = typed;
    }
    if (form.decision.value) asked.decision = form.decision.value;
    return asked;
  }

  async #ask(anew) {
    if (!anew && this.#byHand) return; // its answer is the one that is waited for
    const asked = ++this.#asked;
    const life = this.#life;
    const query = new URLSearchParams({ ...this.#filter, limit: this.#limit });
    if (!anew && this.#found && this.#foundIn === life) query.set("after", this.#found.total);
    this.#byHand = anew;
    let found;
    try {
      found = await this.#get("/api/flagged", query); // not in the URL, which proxies log
    } catch (error) {
      // What was not asked for by hand is asked again anyway.
      if (anew) say("count", `The list could not be read: ${error.message}.`);
      return;
    } finally {
      if (asked === this.#asked) this.#byHand = false;
    }
    if (asked !== this.#asked) return;
    if (found) [this.#found, this.#foundIn] = [found, life];
    const news = this.#found.flagged !== this.#shown;
    if (anew || (news && !this.#held())) this.#render();
    else if (news) this.#offer();
    if (anew) this.#announce(`${words.count(found.matching)} flagged ${found.matching === 1 ? "transaction matches" : "transactions match"}.`);
  }

  /** Whether somebody points into the table, has the focus in it, or reads a record. */
  #held() {
    const rows = byId("rows");
    const pointed = matchMedia("(hover: hover)").matches && rows.matches(":hover");
    return this.#shown.length > 0 && (pointed || rows.contains(document.activeElement) || byId("record").open);
  }

  #offer() {
    const top = this.#shownIn === this.#foundIn ? this.#shown[0].number : 0;
    const newer = this.#found.flagged.filter((record) => record.number > top).length;
    const all = newer === this.#found.flagged.length ? " or more" : "";
    byId("newer").hidden = newer === 0;
    say("newer", `Show ${words.count(newer)}${all} newer`);
  }

  async #more() {
    const before = this.#shown.length;
    this.#limit = Math.min(this.#limit + PAGE, this.#found.capacity);
    await this.#ask(true);
    byId("rows").querySelectorAll("button")[before]?.focus();
  }

  #render() {
    const found = this.#found;
    [this.#shown, this.#shownIn] = [found.flagged, this.#foundIn];
    byId("newer").hidden = true;
    byId("list").hidden = !found.flagged.length;
    byId("rows").replaceChildren(...found.flagged.map(row));
    byId("more").hidden = found.flagged.length >= found.matching || this.#limit >= found.capacity;
    const filtered = Object.keys(this.#filter).length > 0;
    const kept = found.total > found.kept ? `the newest ${words.count(found.kept)} of ${words.count(found.total)}` : words.count(found.total);
    say(
      "count",
      found.total === 0
        ? ""
        : filtered
          ? `${words.count(found.matching)} of ${kept} match.`
          : `${words.count(found.flagged.length)} shown, of ${kept} flagged since the start.`,
    );
    byId("none").hidden = found.flagged.length > 0;
    say(
      "none",
      found.total === 0
        ? "Nothing has been flagged since the flow was started. Approved transactions are not listed."
        : "None of the transactions that are kept here matches. Older ones are on the predictions topic.",
    );
  }

  #open(record) {
    const dialog = byId("record");
    say("record-title", `Transaction ${record.transaction_id}`);
    byId("record-body").replaceChildren(...this.#whole(record));
    dialog.showModal();
    dialog.scrollTop = 0;
  }

  #only(field, id) {
    const form = byId("filter");
    form.reset();
    form.elements[field].value = `"${id}"`;
    byId("record").close();
    form.elements[field].focus();
    this.#ask(true);
  }

  #whole(record) {
    const only = (field, id) => {
      const button = el("button", { type: "button", class: "small" }, "only this one", el("span", { class: "unseen" }, ` ${field} ${id}`));
      button.addEventListener("click", () => this.#only(field, id));
      return button;
    };
    return [
      el("p", { class: "verdicts" }, decision(record), " ", scoreOf(record), " ", words.MODE_SENTENCES[record.score_mode] ?? record.score_mode),
      drivers(record),
      el("h3", {}, "The transaction"),
      facts([
        ["Time", time(record.event_time, words.fullTime)],
        ["Card", id(record.card_id), only("card", record.card_id)],
        ["Terminal", id(record.terminal_id), only("terminal", record.terminal_id)],
        ["Amount", words.amount(record.amount)],
      ]),
      ...(Object.keys(record.features).length ? [el("h3", {}, "All features"), features(record)] : []),
      el("h3", {}, "Where it came from"),
      facts([
        ["Kafka", `${record.topic}, partition ${record.partition}, offset ${record.offset}`],
        ["Appended", time(record.append_time, words.fullTime)],
        ["Flagged", time(record.flagged_time, words.fullTime), ` ${words.count(record.flagged_time - record.append_time)} ms later`],
        ["Model", id(record.model_version)],
        ["Schema", id(record.schema_hash)],
      ]),
      el("p", {}, el("a", { href: `/api/record?${new URLSearchParams({ id: record.transaction_id })}`, target: "_blank" }, "This record as JSON")),
    ];
  }
}

// --- pieces --------------------------------------------------------------------------------------

const id = (text) => el("code", {}, text);
const time = (ms, format) => el("time", { datetime: new Date(ms).toISOString(), title: words.utc(ms) }, format(ms));
const decision = (record) => el("span", { class: "decision", "data-kind": record.decision }, record.decision);

function scoreOf(record) {
  if (record.score === null) return el("span", {}, "No score.");
  return el("span", {}, "Score ", el("b", {}, words.score(record.score)), ".");
}

function why(record) {
  if (record.score === null && record.score_mode === "full") return "a feature was not a number";
  const [first, ...more] = record.reasons.filter((reason) => reason.contribution);
  if (!first) return record.score_mode === "full" ? "no single feature" : words.NONE;
  const text = ({ feature, contribution }) => `${words.feature(feature)} ${words.contribution(contribution)}`;
  return el("span", {}, text(first), more.length ? el("span", { class: "also" }, ` · ${more.map(text).join(" · ")}`) : null);
}

function row(record) {
  const cell = (kind, ...children) => el("td", { role: "cell", class: kind }, ...children);
  return el("tr", { role: "row", "data-number": record.number, "data-kind": record.decision },
    el("th", { role: "rowheader", scope: "row", class: "tx" },
      el("button", { type: "button", class: "link", "aria-haspopup": "dialog" }, record.transaction_id)),
    cell("when", time(record.event_time, words.time)),
    cell("card", id(record.card_id)),
    cell("terminal", id(record.terminal_id)),
    cell("number amount", words.amount(record.amount)),
    record.score === null
      ? cell("score", el("span", { class: "also" }, "no score"))
      : cell("score", el("span", { class: "figure" }, words.score(record.score)), bar(record.score, record.decision)),
    cell("verdict", decision(record)),
    cell("mode", words.MODES[record.score_mode] ?? record.score_mode, " ", el("code", { class: "version" }, record.model_version)),
    cell(record.reasons.length ? "why" : "why none", why(record)),
  );
}

function drivers(record) {
  const heading = el("h3", {}, "What drove the score");
  if (!record.reasons.length) {
    const none = record.score_mode !== "full"
      ? "The model was not asked, so no feature can be named."
      : record.score === null
        ? "The model gave no score, for one of the features was not a number. Such transactions are always reviewed."
        : "No features were named for this one.";
    return el("div", {}, heading, el("p", { class: "empty" }, none));
  }
  const most = Math.max(...record.reasons.map((reason) => Math.abs(reason.contribution)));
  const both = record.reasons.some((reason) => reason.contribution < 0);
  const items = record.reasons.map(({ feature, contribution }) =>
    el("li", {},
      el("span", { class: "what" }, el("b", {}, words.feature(feature)), ` is ${words.value(record.features[feature])}`),
      signedBar(contribution, most, both),
      el("span", { class: "by" }, contribution > 0 ? "raises the score by " : contribution < 0 ? "lowers the score by " : "does not move the score ",
        contribution ? el("b", {}, words.contributionExact(Math.abs(contribution)).replace("+", "")) : null),
    ),
  );
  return el("div", {}, heading, el("ul", { class: "drivers" }, ...items),
    el("p", { class: "hint" }, "By how much the score would change if that one feature had the value usual among legitimate transactions."));
}

function features(record) {
  const by = Object.fromEntries(record.reasons.map((reason) => [reason.feature, reason.contribution]));
  const rows = Object.entries(record.features).map(([name, value]) =>
    el("tr", { "data-named": name in by },
      el("th", { scope: "row" }, words.feature(name), el("code", {}, name)),
      el("td", { class: "number" }, value === null ? "not a number" : words.value(value)),
      el("td", { class: "number" }, name in by ? words.contributionExact(by[name]) : ""),
    ),
  );
  return el("table", { class: "features" },
    el("thead", {}, el("tr", {},
      el("th", { scope: "col" }, "feature"),
      el("th", { scope: "col", class: "number" }, "value"),
      el("th", { scope: "col", class: "number" }, "on the score"))),
    el("tbody", {}, ...rows),
  );
}

function facts(rows) {
  return el("dl", { class: "facts" }, ...rows.map(([name, ...values]) =>
    el("div", {}, el("dt", {}, name), el("dd", {}, ...values.flatMap((v) => [v, " "])))));
}
