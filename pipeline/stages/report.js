// The browser of pairs. Text of models is only ever set as textContent: nothing in an answer can become markup.
"use strict";

(function browsePairs() {
  const data = JSON.parse(document.getElementById("pairs-data").textContent);
  const cells = data.cells || {};
  let rows = data.rows || null;
  const waiting = {};
  const STEP = 20;

  const element = (tag, text, className) => {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    return made;
  };

  // ------------------------------------------------------------ data beside the page
  window.datadosePairs = (name, value) => {
    if (name === "rows") rows = value;
    else cells[name] = value;
    (waiting[name] || []).forEach((resume) => resume());
    delete waiting[name];
  };

  const loaded = (name) => (name === "rows" ? rows !== null : name in cells);

  const load = (name) =>
    loaded(name)
      ? Promise.resolve()
      : new Promise((resume, refuse) => {
          (waiting[name] = waiting[name] || []).push(resume);
          if (waiting[name].length > 1) return;
          const script = element("script");
          script.src = data.files[name];
          script.onerror = () => {
            delete waiting[name];
            refuse(new Error(`${data.files[name]} is missing: keep it in the folder of this page`));
          };
          document.head.append(script);
        });

  // ------------------------------------------------------------ filters
  const form = document.getElementById("pairs-filters");
  const select = (label, options) => {
    const made = element("select");
    options.forEach(([value, text]) => made.append(Object.assign(element("option", text), { value })));
    const wrapped = element("label", `${label} `);
    wrapped.append(made);
    form.append(wrapped);
    made.addEventListener("change", show);
    return made;
  };

  // What all verdicts of one key say together; blind: both orders must agree.
  const outcome = (verdicts, key, protocol) => {
    const picks = verdicts.filter((verdict) => verdict[0] === key).map((verdict) => verdict[2]);
    if (picks.length < (protocol === "blind" ? 2 : 1) || picks.includes(null)) return "unparsed";
    if (new Set(picks).size > 1) return "tied";
    return picks[0] === "candidate" ? "won" : "lost";
  };

  const cell = select("cell", data.names.map((name) => [name, name]));
  const verdictOptions = [["", "any"]];
  data.keys.forEach((item) => ["won", "lost", "tied", "unparsed"].forEach((word) => verdictOptions.push([`${item.key}|${word}`, `${word} (${item.protocol}, ${item.judge})`])));
  const verdict = data.keys.length ? select("verdict", verdictOptions) : null;
  const fields = [];
  let tier = null;
  const search = Object.assign(element("input"), { type: "search", placeholder: "words in prompt or answers" });
  search.addEventListener("input", show);

  const fieldFilters = () => {
    const distinct = (values) => [["", "any"], ...[...new Set(values)].sort().map((value) => [value, value])];
    data.columns.forEach((column, index) => fields.push(select(column, distinct(rows.map((row) => row.fields[index])))));
    const tiers = distinct(rows.map((row) => row.tier));
    if (tiers.length > 2) tier = select("tier", tiers);
    form.append(search);
  };

  const chosen = () => {
    const answers = cells[cell.value];
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const [key, word] = verdict && verdict.value ? verdict.value.split("|") : [null, null];
    const protocol = key && data.keys.find((item) => item.key === key).protocol;
    return rows
      .map((row, index) => ({ row, found: answers[index] }))
      .filter(({ row, found }) => {
        if (!found) return false;
        if (fields.some((field, index) => field.value && row.fields[index] !== field.value)) return false;
        if (tier && tier.value && row.tier !== tier.value) return false;
        if (key && outcome(found[1], key, protocol) !== word) return false;
        const text = words.length ? `${row.prompt} ${row.base} ${found[0]}`.toLowerCase() : "";
        return words.every((one) => text.includes(one));
      });
  };

  // ------------------------------------------------------------ the list
  const list = document.getElementById("pairs");
  const count = document.getElementById("pairs-count");
  const more = document.getElementById("pairs-more");

  const answer = (title, text) => {
    const made = element("div");
    made.append(element("b", title), element("p", text || "(empty)"));
    return made;
  };

  const verdictLine = ([key, order, pick, status, explanation]) => {
    const item = data.keys.find((one) => one.key === key);
    const word = pick === null ? status : pick === "candidate" ? "fine-tune" : "base";
    const place = item.protocol === "blind" ? `, ${order === 0 ? "base" : "fine-tune"} shown first` : "";
    const made = element("li");
    made.append(element("b", word), ` (${item.protocol}, ${item.judge}${place})`);
    if (explanation) made.append(element("q", explanation));
    return made;
  };

  const entry = ({ row, found }) => {
    const made = element("details");
    const summary = element("summary", row.fields.join(" · "));
    data.keys.forEach((item) => {
      const word = outcome(found[1], item.key, item.protocol);
      summary.append(" ", element("span", `${item.key}: ${word}`, `outcome ${word}`));
    });
    made.append(summary);
    made.addEventListener("toggle", () => {
      if (made.childElementCount > 1) return;
      const pair = element("div", undefined, "pair");
      pair.append(answer("base", row.base), answer(cell.value, found[0]));
      made.append(element("p", row.prompt, "prompt"), pair);
      if (found[1].length) {
        const said = element("ul", undefined, "verdicts");
        found[1].forEach((one) => said.append(verdictLine(one)));
        made.append(said);
      }
    });
    return made;
  };

  let shown = [];
  let upTo = 0;
  const extend = () => {
    shown.slice(upTo, upTo + STEP).forEach((item) => list.append(entry(item)));
    upTo = Math.min(upTo + STEP, shown.length);
    more.hidden = upTo >= shown.length;
  };

  function show() {
    const wanted = cell.value;
    Promise.all([load("rows"), load(wanted)])
      .then(() => {
        if (cell.value !== wanted) return;
        if (!fields.length) fieldFilters();
        shown = chosen();
        upTo = 0;
        list.replaceChildren();
        count.textContent = `${shown.length} of ${rows.length} pairs`;
        extend();
      })
      .catch((error) => {
        count.textContent = error.message;
      });
  }

  more.addEventListener("click", extend);
  show();
})();
