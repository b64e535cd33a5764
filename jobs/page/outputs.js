"use strict";
// The list of outputs: search, filters, order, pages, and the reader that opens one beside its document.
// Texts of strangers only ever become text nodes.
(() => {
  const ROWS_OF_A_PAGE = 25;
  const KEPT_BLOCKS = 6; // unpacked blocks of documents that are kept; the texts of all rows stay for the search
  const ORDERS = [
    ["name", "By id"],
    ["slow", "Slowest first"],
    ["long", "Longest document first"],
    ["short", "Shortest document first"],
  ];
  const box = document.querySelector(".outputs");
  const [search, rows, found, pages] = ["input", ".rows", ".found", ".pages"].map((name) => box.querySelector(name));
  const groups = [...box.querySelectorAll(".groups button")];
  const selects = [...box.querySelectorAll("select")];
  const reader = box.querySelector(".reader");
  const body = reader.querySelector(".reader-body");
  const title = reader.querySelector("h2");

  const make = (tag, className = "", ...children) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    element.append(...children);
    return element;
  };
  const counted = (number) => number.toLocaleString("en");

  // -- data

  let index = null; // columns of all rows
  let shown = []; // numbers of the rows that pass the filters, in order
  let page = 0;
  let open = -1; // place in `shown` of the row that the reader shows
  const query = { text: "", group: -1, status: -1, flagged: -1, question: -1, order: "" };
  const blocks = new Map();

  const unpack = async (name) => {
    const text = document.getElementById(name).textContent;
    const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
    return JSON.parse(await new Response(stream).text());
  };

  const loaded = new Promise((done) => {
    if (document.readyState === "loading") addEventListener("DOMContentLoaded", done);
    else done();
  });

  // The value of a row or a document, out of the block that holds it.
  const value = async (kind, number) => {
    const starts = index.starts[kind];
    let at = starts.length - 1;
    while (starts[at] > number) at -= 1;
    return (await block(`${kind}-${at}`))[number - starts[at]];
  };
  const block = async (name) => {
    if (!document.getElementById(name)) await loaded; // the page is still being read
    if (!blocks.has(name)) {
      blocks.set(name, unpack(name));
      const documents = [...blocks.keys()].filter((key) => key.startsWith("documents"));
      if (documents.length > KEPT_BLOCKS) blocks.delete(documents[0]);
    }
    return blocks.get(name);
  };

  // Of every row what the search looks through, in small letters; made when somebody first searches.
  let haystacks = null;
  const allTexts = () => {
    haystacks ??= (async () => {
      const texts = [];
      for (let at = 0; at < index.starts.rows.length; at += 1) {
        for (const row of await block(`rows-${at}`)) {
          const parts = row.panes.flatMap((pane) => pane.parts.map(([text]) => text));
          const answer = row.answer.map(([, text]) => text);
          texts.push([index.name[texts.length], row.error, ...parts, ...answer].join("\n").toLowerCase());
        }
      }
      return texts;
    })();
    return haystacks;
  };

  // -- the list

  const passes = (row) =>
    (query.group < 0 || index.group[row] === query.group) &&
    (query.status < 0 || index.status[row] === query.status) &&
    (query.flagged < 0 || index.flagged[row].includes(query.flagged)) &&
    (query.question < 0 || index.question[row] === query.question);

  const inOrder = (numbers) => {
    const by = {
      name: (a, b) => index.name[a].localeCompare(index.name[b], "en", { numeric: true }),
      slow: (a, b) => (index.seconds[b] ?? -1) - (index.seconds[a] ?? -1),
      long: (a, b) => index.tokens[b] - index.tokens[a],
      short: (a, b) => index.tokens[a] - index.tokens[b],
    }[query.order];
    return by ? numbers.sort((a, b) => by(a, b) || a - b) : numbers;
  };

  let asked = 0;
  const refresh = async ({ keepPage = false } = {}) => {
    const turn = (asked += 1);
    const words = query.text.toLowerCase().split(/\s+/).filter(Boolean);
    let numbers = index.name.map((_, row) => row).filter(passes);
    let texts = null;
    if (words.length) {
      texts = await allTexts();
      if (turn !== asked) return; // somebody typed on
      numbers = numbers.filter((row) => words.every((word) => texts[row].includes(word)));
    }
    shown = inOrder(numbers);
    page = keepPage ? Math.min(page, lastPage()) : 0;
    await draw(words, turn);
  };
  const lastPage = () => Math.max(0, Math.ceil(shown.length / ROWS_OF_A_PAGE) - 1);

  const draw = async (words, turn) => {
    const first = page * ROWS_OF_A_PAGE;
    const numbers = shown.slice(first, first + ROWS_OF_A_PAGE);
    const excerpts = words.length ? await Promise.all(numbers.map((row) => around(row, words))) : [];
    if (turn !== asked) return;
    const items = numbers.map((row, at) => rowItem(row, first + at, excerpts[at] ?? index.preview[row], words));
    const headings = !query.order && query.group < 0 && !words.length;
    rows.replaceChildren(
      ...items.flatMap((item, at) => {
        const group = index.group[numbers[at]];
        const begins = headings && (at === 0 || index.group[numbers[at - 1]] !== group);
        return begins ? [groupHeading(index.groups[group]), item] : [item];
      }),
    );
    rows.start = first + 1;
    const all = index.name.length;
    found.textContent = shown.length === all ? `${counted(all)} outputs` : `${counted(shown.length)} of ${counted(all)} outputs`;
    if (!shown.length) rows.replaceChildren(make("li", "nothing", "Nothing fits. ", resetButton()));
    pages.hidden = lastPage() === 0;
    pages.querySelector("span").textContent = `Page ${counted(page + 1)} of ${counted(lastPage() + 1)}`;
    const [before, after] = pages.querySelectorAll("button");
    before.disabled = page === 0;
    after.disabled = page === lastPage();
    groups.forEach((button, at) => button.setAttribute("aria-pressed", String(query.group === at)));
    box.dataset.drawn = String(turn);
    if (turn === 1) performance.mark("outputs");
  };

  const groupHeading = ({ label, about }) => {
    const heading = make("li", "group", label, make("span", "note", about));
    heading.setAttribute("role", "presentation");
    return heading;
  };

  const resetButton = () => {
    const button = make("button", "plain", "Show all");
    button.type = "button";
    button.addEventListener("click", reset);
    return button;
  };
  const reset = () => {
    Object.assign(query, { text: "", group: -1, status: -1, flagged: -1, question: -1 });
    search.value = "";
    for (const select of selects) if (select.dataset.by !== "order") select.value = "-1";
    return refresh();
  };

  const rowItem = (row, place, text, words) => {
    const link = make("a", "row");
    link.href = `#row=${row}`;
    link.dataset.place = place;
    const head = make("span", "row-head", bidi(index.name[row], words), ...badges(row));
    const preview = make("span", index.status[row] ? "preview bad" : "preview", bidi(text || "There is no output.", words));
    const figures = [];
    if (index.tokens[row]) figures.push(make("span", "", `${counted(index.tokens[row])} tokens`));
    if (index.seconds[row] !== null) figures.push(make("span", "", inSeconds(index.seconds[row])));
    link.append(head, preview, make("span", "row-figures", ...figures));
    return make("li", "", link);
  };

  const inSeconds = (seconds) =>
    seconds < 0.9995 ? `${(seconds * 1000).toPrecision(3) / 1} ms`
      : seconds < 100 ? `${seconds.toFixed(1)} s` : `${counted(Math.round(seconds))} s`;

  const badges = (row) => {
    const status = index.statuses[index.status[row]];
    const told = index.flagged[row].map((flag) => index.flags[flag]);
    if (status.tone) told.unshift(status);
    const question = index.questions.length > 1 && index.question[row] >= 0 ? index.questions[index.question[row]] : null;
    const all = told.map(({ label, about, tone }) => {
      const badge = make("span", `badge ${tone}`, label);
      badge.title = about;
      return badge;
    });
    if (question) {
      const badge = make("span", "badge asked", make("bdi", "", question.name));
      badge.title = question.text;
      all.unshift(badge);
    }
    return all;
  };

  // A stranger's text, which may run from right to left, with the words of the search marked.
  const bidi = (text, words) => {
    const element = make("bdi");
    const small = text.toLowerCase();
    let at = 0;
    while (words.length && small.length === text.length) {
      const hits = words.map((word) => [small.indexOf(word, at), word.length]).filter(([start]) => start >= 0);
      if (!hits.length) break;
      const [start, length] = hits.reduce((one, other) => (other[0] < one[0] ? other : one));
      element.append(text.slice(at, start), make("mark", "found-word", text.slice(start, start + length)));
      at = start + length;
    }
    element.append(text.slice(at));
    return element;
  };

  // The words around the first hit in an output, if it is not in what the list shows anyway.
  const around = async (row, words) => {
    const preview = index.preview[row];
    if (words.some((word) => preview.toLowerCase().includes(word))) return preview;
    const { panes } = await value("rows", row);
    const text = panes.map((pane) => pane.parts.map(([part]) => part).join("")).join("\n");
    const small = text.toLowerCase();
    const hit = Math.min(...words.map((word) => small.indexOf(word)).filter((at) => at >= 0));
    if (!Number.isFinite(hit)) return preview;
    const start = Math.max(0, hit - 80);
    return (start ? "\u2026 " : "") + text.slice(start, hit + 160).replace(/\s+/g, " ");
  };

  // -- the reader

  const show = async (place) => {
    const row = shown[place];
    const detail = await value("rows", row);
    const excerpt = detail.document < 0 ? null : await value("documents", detail.document);
    open = place;
    title.replaceChildren(make("bdi", "", index.name[row]), " ", ...badges(row));
    reader.querySelector(".place").textContent = `${counted(place + 1)} of ${counted(shown.length)}`;
    const [before, after] = reader.querySelectorAll("[data-step]");
    before.disabled = place === 0;
    after.disabled = place === shown.length - 1;
    body.replaceChildren(...readerBlocks(row, detail, excerpt));
    if (!reader.open) reader.showModal();
    title.focus({ preventScroll: true });
    body.scrollTop = 0;
    const passage = body.querySelector(".document mark");
    if (passage) scrollInside(passage);
  };

  const readerBlocks = (row, detail, excerpt) => {
    const all = [];
    if (index.question[row] >= 0) {
      const { text } = index.questions[index.question[row]];
      if (text) all.push(make("p", "question", make("bdi", "", text)));
    }
    if (detail.error) all.push(make("p", "error", make("bdi", "", detail.error)));
    const why = index.flagged[row].map((flag) => index.flags[flag].about).filter(Boolean);
    if (why.length && detail.panes.length === 1) all.push(make("p", "note", `Marked because ${why.join("; ")}.`));
    if (detail.answer.length) all.push(answerList(detail.answer));
    const told = howToRead(detail.panes);
    if (told) all.push(make("p", "note", told));
    all.push(make("div", "panes", ...besideDocument(detail, excerpt)));
    if (detail.reasoning) {
      all.push(make("details", "", make("summary", "", "What the model thought before it wrote"), make("div", "text", detail.reasoning)));
    }
    if (detail.facts.length) {
      all.push(make("dl", "facts", ...detail.facts.map(([what, figure]) => make("div", "", make("dt", "", what), make("dd", "", make("bdi", "", figure))))));
    }
    return all;
  };

  const pane = (name, told, text) => {
    const section = make("section", "pane", make("h3", "", name));
    if (told) section.append(make("p", "note", told));
    section.append(text);
    return section;
  };
  const answerList = (answer) =>
    make("dl", "answer", ...answer.map(([name, text]) => make("div", "", make("dt", "", make("bdi", "", name)), make("dd", "", make("bdi", "", text)))));

  // The outputs, whose supported pieces lead to their passages, and the document with these passages marked.
  const besideDocument = (detail, excerpt) => {
    const passages = new Map(); // number of the evidence -> its first piece in the document
    const claims = new Map(); // and in the output
    const evidence = []; // of all outputs
    const outputs = detail.panes.map((written) => {
      const spans = (written.evidence ?? []).map(([outputStart, outputEnd, start, end, score], at) => (
        { outputStart, outputEnd, start, end, score, number: evidence.length + at }
      ));
      evidence.push(...spans);
      return pane(written.title, written.note, outputText(written.parts, spans, evidence, claims, passages, detail.pages));
    });
    if (!excerpt && !detail.documentNote) return outputs;
    const part = pane("Document", detail.documentNote, documentText(excerpt, evidence, passages, claims, detail.pages));
    part.classList.add("document");
    return [...outputs, part];
  };

  const outputText = (parts, spans, evidence, claims, passages, starts) => {
    const text = make("div", "text");
    text.dir = "auto";
    const output = parts.map(([part]) => part).join("");
    let at = 0;
    const only = parts.flatMap(([part, kind]) => {
      const span = [at, (at += part.length), kind];
      return kind ? [span] : [];
    });
    let from = 0;
    for (const [piece, numbers] of cut(0, output, spans.map((one) => [one.outputStart, one.outputEnd, one.number]))) {
      const marked = cut(from, piece, only).map(([each, [kind]]) => (kind ? make("ins", kind, each) : each));
      if (numbers.length) text.append(claim(marked, numbers, evidence, claims, passages, starts));
      else text.append(...marked);
      from += piece.length;
    }
    if (!output) text.append(make("span", "note", "There is no output."));
    return text;
  };

  const howToRead = (panes) => {
    const told = [];
    if (panes.some(({ parts }) => parts.some(([, kind]) => kind))) told.push("Words with a coloured ground are not in the other output.");
    const looked = panes.filter(({ evidence }) => evidence);
    if (looked.some(({ evidence }) => evidence.length)) {
      told.push("What is underlined leads to the passage that is worded most like it: read whether that says the same. The rest has none, or is too short to be looked up.");
    } else if (looked.length) told.push("Without a passage it may be right all the same: it wants reading.");
    return told.join(" ");
  };

  const claim = (pieces, numbers, evidence, claims, passages, starts) => {
    const link = make("a", "claim", ...pieces, make("sup", "", numbers.map((number) => number + 1).join(",")));
    link.href = "#";
    link.title = numbers.map((number) => about(evidence[number], starts)).join("; ");
    for (const number of numbers) if (!claims.has(number)) claims.set(number, link);
    let next = 0;
    link.addEventListener("click", (event) => {
      event.preventDefault();
      const there = numbers.filter((number) => passages.has(number));
      if (there.length) choose(passages.get(there[next++ % there.length]), link);
    });
    return link;
  };
  const about = ({ start, score }, starts) => {
    const pageNumber = starts.length ? `page ${starts.filter((first) => first <= start).length}` : `from character ${counted(start)}`;
    return score === null ? pageNumber : `${pageNumber}, score ${score.toFixed(2)}`;
  };

  const choose = (mark, from) => {
    for (const other of body.querySelectorAll(".chosen")) other.classList.remove("chosen");
    for (const each of [mark, from]) each?.classList.add("chosen");
    mark.scrollIntoView({ block: "center", behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
    mark.focus({ preventScroll: true });
  };
  // To the first passage, but where the document has a column of its own only: the reader begins at its top.
  const scrollInside = (mark) => {
    const text = mark.closest(".text");
    const { top } = text.getBoundingClientRect();
    if (text.scrollHeight > text.clientHeight) text.scrollTop += mark.getBoundingClientRect().top - top - 60;
  };

  const documentText = (excerpt, evidence, passages, claims, starts) => {
    const text = make("div", "text");
    text.dir = "auto";
    let at = 0;
    const gap = (from, to) => to > from && text.append(make("p", "gap", `${counted(to - from)} characters are not shown`));
    for (const [start, passage] of excerpt?.passages ?? []) {
      gap(at, start);
      for (const [piece, numbers] of cut(start, passage, evidence.map((one) => [one.start, one.end, one.number]))) {
        if (!numbers.length) {
          text.append(piece);
          continue;
        }
        const mark = make("mark", "", piece);
        mark.tabIndex = -1;
        const fresh = numbers.filter((number) => !passages.has(number));
        for (const number of fresh) {
          passages.set(number, mark);
          mark.prepend(backLink(number, mark, claims, about(evidence[number], starts)));
        }
        text.append(mark);
      }
      at = start + passage.length;
    }
    if (excerpt) gap(at, excerpt.length);
    return text;
  };
  const backLink = (number, mark, claims, where) => {
    const link = make("a", "back", String(number + 1));
    link.href = "#";
    link.title = `${where}; back to the sentence`;
    link.setAttribute("aria-label", `Passage ${number + 1}, ${where}; back to the sentence`);
    link.addEventListener("click", (event) => {
      event.preventDefault();
      const sentence = claims.get(number);
      if (!sentence) return;
      choose(mark, sentence);
      sentence.scrollIntoView({ block: "center" });
      sentence.focus({ preventScroll: true });
    });
    return link;
  };

  // A text, of which `start` is the first character's offset, in pieces: (piece, numbers of the spans that hold it).
  const cut = (start, text, spans) => {
    const end = start + text.length;
    const inside = spans
      .map(([from, to, number]) => [Math.max(from, start), Math.min(to, end), number])
      .filter(([from, to]) => from < to);
    const borders = [...new Set([start, end, ...inside.flatMap(([from, to]) => [from, to])])].sort((a, b) => a - b);
    return borders.slice(1).map((to, at) => {
      const from = borders[at];
      const numbers = inside.filter(([first, last]) => first <= from && last >= to).map(([, , number]) => number);
      return [text.slice(from - start, to - start), numbers];
    });
  };

  // -- what a reader does

  const follow = () => {
    const row = /^#row=(\d+)$/.exec(location.hash)?.[1];
    if (row === undefined) {
      if (reader.open) reader.close();
      return;
    }
    const place = shown.indexOf(Number(row));
    if (place >= 0) show(place);
  };
  const go = (place) => {
    if (place < 0 || place >= shown.length) return;
    history.replaceState(null, "", `#row=${shown[place]}`);
    show(place);
  };
  const leave = () => {
    if (location.hash) history.replaceState(null, "", location.pathname + location.search);
    const at = Math.floor(open / ROWS_OF_A_PAGE);
    const focus = () => rows.querySelector(`[data-place="${open}"]`)?.focus();
    if (at !== page) {
      page = at;
      refresh({ keepPage: true }).then(focus);
    } else focus();
  };
  const turnPage = async (step, which) => {
    if (page + step < 0 || page + step > lastPage()) return;
    page += step;
    await refresh({ keepPage: true });
    box.scrollIntoView({ block: "start" });
    const links = rows.querySelectorAll("a");
    links[which === "last" ? links.length - 1 : 0]?.focus({ preventScroll: which !== "last" });
  };
  const move = (step) => {
    const links = [...rows.querySelectorAll("a")];
    const at = links.indexOf(document.activeElement);
    const next = at < 0 ? links[0] : links[at + step];
    if (next) {
      next.focus();
      next.scrollIntoView({ block: "nearest" });
    } else if (at >= 0) turnPage(step, step < 0 ? "last" : "first");
  };

  const onKey = (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const typing = event.target.matches("input, select, textarea");
    if (reader.open) {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (step) {
        event.preventDefault();
        go(open + step);
      }
    } else if (event.key === "/" && !typing) {
      event.preventDefault();
      search.focus();
      search.select();
    } else if (event.key === "Escape" && event.target === search) {
      event.preventDefault();
      reset().then(() => move(1));
    } else if (["ArrowDown", "ArrowUp"].includes(event.key) && !event.target.matches("select") && (box.contains(event.target) || event.target === document.body)) {
      event.preventDefault();
      move(event.key === "ArrowDown" ? 1 : -1);
    }
  };

  const fill = (select, options, any) => {
    select.replaceChildren(
      ...[...(any ? [["-1", any]] : []), ...options].map(([name, label]) => {
        const option = make("option", "", label);
        option.value = name;
        return option;
      }),
    );
    select.hidden = options.length < 2 && !(any && options.length && select.dataset.by === "flagged");
    select.addEventListener("change", () => {
      query[select.dataset.by] = select.dataset.by === "order" ? select.value : Number(select.value);
      refresh();
    });
  };

  const start = async () => {
    index = await unpack("index");
    const tally = (numbers, labels) => {
      const counts = labels.map(() => 0);
      for (const number of numbers) if (number >= 0) counts[number] += 1;
      return labels.map((label, at) => [String(at), `${label} (${counted(counts[at])})`]);
    };
    const [status, flagged, question, order] = selects;
    fill(status, tally(index.status, index.statuses.map((each) => each.label)), "Any status");
    fill(flagged, tally(index.flagged.flat(), index.flags.map((each) => each.label)), "Any flag");
    fill(question, tally(index.question, index.questions.map((each) => each.name)), "All questions");
    fill(order, [["", index.order], ...ORDERS]);
    groups.forEach((button, at) => {
      button.addEventListener("click", () => {
        query.group = query.group === at ? -1 : at;
        refresh();
      });
    });
    let waiting = 0;
    search.disabled = false;
    search.addEventListener("input", () => {
      clearTimeout(waiting);
      waiting = setTimeout(() => {
        query.text = search.value;
        refresh();
      }, 150);
    });
    for (const button of pages.querySelectorAll("button")) {
      button.addEventListener("click", () => turnPage(Number(button.dataset.step), "first"));
    }
    for (const button of reader.querySelectorAll("[data-step]")) {
      button.addEventListener("click", () => go(open + Number(button.dataset.step)));
    }
    reader.querySelector(".close").addEventListener("click", () => reader.close());
    reader.addEventListener("close", leave);
    addEventListener("keydown", onKey);
    addEventListener("hashchange", follow);
    await refresh();
    follow();
  };

  start().catch((error) => {
    found.textContent = `The list could not be shown: ${error.message}. A browser of 2023 or later is needed.`;
    console.error(error);
  });
})();
