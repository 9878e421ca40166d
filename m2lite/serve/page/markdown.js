/* Markdown as nodes: they are built one by one and nothing is parsed as HTML, so a tag in a text stays text.
 * Knows paragraphs, headings, lists, quotes, tables, rules, fenced code, and in a line bold, italic, struck, code, links.
 * Every search is bounded, so that no text takes longer than its length allows. */

import { copies, element } from "./dom.js";

const MOST_DEPTH = 8; // of lists, quotes and emphasis in each other; deeper ones stay text
const MOST_LINK = 2000; // characters of one with its name
const FENCE = /^ {0,3}(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:\s|$)/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}>/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])( +|$)/;
const sources = new WeakMap(); // of each block that a target shows

/** Shows `text` in `target`. Of a text that grows, what has not changed stays as it is, selected text and all. */
export function render(target, text) {
  const blocks = split(text.split("\n"), 0);
  const before = sources.get(target) ?? [];
  let same = 0;
  while (same < blocks.length && blocks[same].source === before[same]) same++;
  while (target.childNodes.length > same) target.lastChild.remove();
  for (const block of blocks.slice(same)) target.append(block.build());
  sources.set(target, blocks.map((block) => block.source));
}

// Blocks

/** Blocks {source, build} of lines. */
function split(lines, depth) {
  const found = [];
  for (let at = 0; at < lines.length; ) {
    if (!lines[at].trim()) {
      at++;
      continue;
    }
    const kind = KINDS.find(({ begins, isDeep }) => begins(lines, at) && !(isDeep && depth >= MOST_DEPTH)) ?? PARAGRAPH;
    const end = Math.max(at + 1, kind.end(lines, at));
    const own = lines.slice(at, end);
    found.push({ source: own.join("\n"), build: () => kind.build(own, depth) });
    at = end;
  }
  return found;
}

function append(parent, lines, depth) {
  const blocks = split(lines, depth);
  const isText = blocks.length && PARAGRAPH.is(blocks[0].source);
  blocks.forEach((block, i) => {
    if (i === 0 && isText) inline(parent, block.source); // an item's text needs no paragraph of its own
    else parent.append(block.build());
  });
}

const CODE = {
  begins: (lines, at) => FENCE.test(lines[at]),
  end(lines, at) {
    const mark = FENCE.exec(lines[at])[1];
    for (let i = at + 1; i < lines.length; i++) if (closes(lines[i], mark)) return i + 1;
    return lines.length;
  },
  build(lines) {
    const [, mark, name] = FENCE.exec(lines[0]);
    const isClosed = lines.length > 1 && closes(lines.at(-1), mark);
    const text = lines.slice(1, isClosed ? -1 : undefined).join("\n");
    const figure = element("figure", "code");
    const caption = element("figcaption");
    const button = element("button", "copy", "Copy");
    button.type = "button";
    copies(button, () => text);
    caption.append(element("span", "", name.trim().split(/\s/)[0].slice(0, 40) || "code"), button);
    const pre = element("pre");
    pre.dir = "ltr";
    pre.append(element("code", "", text));
    figure.append(caption, pre);
    return figure;
  },
};

function closes(line, mark) {
  const text = line.trim();
  return text.length >= mark.length && text === mark[0].repeat(text.length);
}

const TITLE = {
  begins: (lines, at) => HEADING.test(lines[at]),
  end: (_, at) => at + 1,
  build([line]) {
    const text = line.trim();
    const level = HEADING.exec(line)[1].length;
    const node = element(`h${Math.min(6, level + 2)}`); // the page has h1 and h2
    inline(node, text.slice(level).trim().replace(/ #+$/, ""));
    return node;
  },
};

const LINE = { begins: (lines, at) => RULE.test(lines[at]), end: (_, at) => at + 1, build: () => element("hr") };

const CITE = {
  isDeep: true,
  begins: (lines, at) => QUOTE.test(lines[at]),
  end: (lines, at) => firstFrom(lines, at, (line) => !QUOTE.test(line)),
  build(lines, depth) {
    const node = element("blockquote");
    const inner = lines.map((line) => line.replace(/^ {0,3}> ?/, ""));
    for (const block of split(inner, depth + 1)) node.append(block.build());
    return node;
  },
};

const LIST = {
  isDeep: true,
  begins: (lines, at) => ITEM.test(lines[at]),
  end(lines, at) {
    const kind = markOf(lines[at]);
    let end = at;
    for (let i = at; i < lines.length; i++) {
      if (!lines[i].trim()) continue; // an empty line ends it only if nothing of it follows
      const isOwn = /^( {2}|\t)/.test(lines[i]) || (ITEM.test(lines[i]) && markOf(lines[i]) === kind);
      if (i > at && !isOwn && (!lines[i - 1].trim() || KINDS.some(({ begins }) => begins(lines, i)))) break;
      end = i + 1;
    }
    return end;
  },
  build(lines, depth) {
    const first = ITEM.exec(lines[0]);
    const node = element(/\d/.test(first[2]) ? "ol" : "ul");
    if (node.tagName === "OL") node.start = parseInt(first[2], 10);
    let item = [];
    const flush = () => {
      if (!item.length) return;
      const li = element("li");
      append(li, item, depth + 1);
      node.append(li);
      item = [];
    };
    let indent = 0;
    const kind = markOf(lines[0]);
    for (const line of lines) {
      const begun = ITEM.exec(line);
      if (begun && markOf(line) === kind && (!item.length || begun[1].length < indent)) {
        flush();
        indent = Math.min(begun[0].length, begun[1].length + begun[2].length + 4) || 2;
        item.push(line.slice(begun[0].length));
      } else {
        const most = line.length - line.trimStart().length;
        item.push(line.slice(Math.min(indent, most)));
      }
    }
    flush();
    return node;
  },
};

/** Bullets, or numbers: where they change, another list begins. */
function markOf(line) {
  return /\d/.test(ITEM.exec(line)[2]) ? "1" : "-";
}

const TABLE = {
  begins: (lines, at) =>
    lines[at].includes("|") && (lines[at + 1] ?? "").includes("|") && cells(lines[at + 1]).every((cell) => /^:?-+:?$/.test(cell)),
  end: (lines, at) => firstFrom(lines, at, (line) => !line.includes("|")),
  build([head, , ...rows]) {
    const box = element("div", "table");
    const table = element("table");
    [head, ...rows].forEach((line, i) => {
      const row = element("tr");
      for (const text of cells(line)) {
        const cell = element(i ? "td" : "th");
        inline(cell, text);
        row.append(cell);
      }
      table.append(row);
    });
    box.append(table);
    return box;
  },
};

function cells(line) {
  return line.trim().replace(/^\|/, "").replace(/\|$/, "").split("|").map((cell) => cell.trim());
}

const KINDS = [CODE, TITLE, LINE, CITE, LIST, TABLE];

const PARAGRAPH = {
  begins: () => true,
  is: (source) => !KINDS.some(({ begins }) => begins(source.split("\n"), 0)),
  end: (lines, at) => {
    const starts = (i) => KINDS.some(({ begins }) => begins(lines, i));
    let end = at + 1;
    while (end < lines.length && lines[end].trim() && !starts(end)) end++;
    return end;
  },
  build(lines) {
    const node = element("p");
    inline(node, lines.map((line) => line.trim()).join("\n"));
    return node;
  },
};

function firstFrom(lines, at, isIt) {
  const found = lines.findIndex((line, i) => i > at && isIt(line));
  return found < 0 ? lines.length : found;
}

// Lines

const SPECIAL = /[\\`*_~[<\n]|https?:\/\//g;
const ADDRESS = /https?:\/\/[^\s<>"`]+/y;
const NAKED = /<(https?:\/\/[^\s<>]+)>/y;
const MARKS = [["**", "strong"], ["__", "strong"], ["~~", "s"], ["*", "em"], ["_", "em"]];

/** Appends the text of a line to a node. */
function inline(parent, text, depth = 0) {
  const missing = new Set(); // marks that nothing behind closes, so that they are looked for once
  let plain = "";
  for (let at = 0; at < text.length; ) {
    SPECIAL.lastIndex = at;
    const next = depth > MOST_DEPTH ? text.length : (SPECIAL.exec(text)?.index ?? text.length);
    plain += text.slice(at, next);
    at = next;
    if (at >= text.length) break;
    const found = span(text, at, missing, depth);
    if (found === null) {
      plain += text[at++];
    } else {
      parent.append(plain, found.node);
      plain = "";
      at = found.end;
    }
  }
  parent.append(plain);
}

/** {node, end} of what begins at `at`; null where it is no more than text. */
function span(text, at, missing, depth) {
  switch (text[at]) {
    case "\n":
      return { node: element("br"), end: at + 1 };
    case "\\":
      return /[!-/:-@[-`{-~]/.test(text[at + 1] ?? "") ? { node: text[at + 1], end: at + 2 } : null;
    case "`":
      return code(text, at, missing);
    case "[":
      return named(text, at);
    case "<":
    case "h":
      return bare(text, at);
    default:
      return marked(text, at, missing, depth);
  }
}

function code(text, at, missing) {
  let n = 1;
  while (text[at + n] === "`") n++;
  const mark = "`".repeat(n);
  const end = missing.has(mark) ? -1 : text.indexOf(mark, at + n);
  if (end < 0) {
    missing.add(mark);
    return { node: mark, end: at + n };
  }
  const inner = text.slice(at + n, end).replaceAll("\n", " ");
  return { node: element("code", "", inner.trim() ? inner.replace(/^ (.*) $/, "$1") : inner), end: end + n };
}

function named(text, at) {
  const near = text.slice(at, at + MOST_LINK);
  const middle = near.indexOf("](");
  const end = middle < 0 ? -1 : near.indexOf(")", middle);
  const node = end < 0 ? null : link(near.slice(middle + 2, end));
  if (node === null) return null;
  node.textContent = near.slice(1, middle).replace(/^[`*_]{1,3}|[`*_]{1,3}$/g, "");
  return { node, end: at + end + 1 };
}

function bare(text, at) {
  NAKED.lastIndex = ADDRESS.lastIndex = at;
  const inner = NAKED.exec(text)?.[1];
  const whole = ADDRESS.exec(text)?.[0] ?? "";
  const found = whole.replace(whole.includes("(") ? /[.,;:!?\]*_]{1,9}$/ : /[.,;:!?)\]*_]{1,9}$/, "");
  const node = link(inner ?? found);
  if (node === null) return null;
  node.textContent = inner ?? found;
  return { node, end: at + (inner ? inner.length + 2 : found.length) };
}

/** A link to another page, which learns nothing of this one; null for any other kind of address. */
function link(address) {
  if (!/^https?:\/\/\S+$/.test(address) || !URL.canParse(address)) return null;
  const node = element("a");
  node.href = address;
  node.rel = "noopener noreferrer";
  node.target = "_blank";
  node.title = node.href;
  return node;
}

function marked(text, at, missing, depth) {
  const [mark, tag] = MARKS.find(([each]) => text.startsWith(each, at)) ?? [];
  if (mark === undefined || missing.has(mark) || depth >= MOST_DEPTH) return null;
  const isWord = (c) => c !== undefined && /[\p{L}\p{N}]/u.test(c);
  const start = at + mark.length;
  if (/^\s?$/.test(text[start] ?? "") || (mark[0] === "_" && isWord(text[at - 1]))) return null;
  for (let end = text.indexOf(mark, start + 1); end >= 0; end = text.indexOf(mark, end + 1)) {
    if (mark.length === 1 && text[end + 1] === mark) {
      end++; // those of what is bold in it
      continue;
    }
    while (mark.length === 2 && text[end + 2] === mark[0]) end++; // *** closes what is in it first
    if (/\s/.test(text[end - 1]) || (mark[0] === "_" && isWord(text[end + mark.length]))) continue;
    const node = element(tag);
    inline(node, text.slice(start, end), depth + 1);
    return { node, end: end + mark.length };
  }
  missing.add(mark);
  return null;
}
