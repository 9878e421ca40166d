/* Nodes and the clipboard. Text is only ever set as text. */

export function byId(id) {
  return document.getElementById(id);
}

export function element(tag, className = "", text = "") {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text) node.textContent = text;
  return node;
}

/** A copy of what a <template> holds. */
export function clone(id) {
  return byId(id).content.firstElementChild.cloneNode(true);
}

/** The button copies what `text()` gives, and says so for a moment. */
export function copies(button, text) {
  const name = button.textContent;
  button.addEventListener("click", async () => {
    button.textContent = (await copy(text())) ? "Copied" : "Cannot copy";
    setTimeout(() => (button.textContent = name), 1500);
  });
}

async function copy(text) {
  if (navigator.clipboard) {
    return navigator.clipboard.writeText(text).then(() => true, () => false);
  }
  const area = element("textarea", "hidden"); // over plain HTTP from another machine there is no clipboard
  area.value = text;
  document.body.append(area);
  area.select();
  const isDone = document.execCommand("copy");
  area.remove();
  return isDone;
}

const WHOLE = new Intl.NumberFormat("en");

export function count(n, noun) {
  return `${WHOLE.format(n)} ${noun}${n === 1 ? "" : "s"}`;
}

export function number(n) {
  return WHOLE.format(n);
}

export function bytes(n) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let at = 0;
  for (; n >= 1000 && at < units.length - 1; at++) n /= 1000;
  return `${n < 10 && at ? n.toFixed(1) : Math.round(n)} ${units[at]}`;
}

export function seconds(s) {
  if (s < 60) return `${s.toFixed(s < 10 ? 1 : 0)} s`;
  return `${Math.floor(s / 60)} min ${Math.round(s % 60)} s`;
}
