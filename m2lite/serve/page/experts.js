/* Which experts of which layers an answer touches: counts per answer, and a grid of layers x experts that lights up.
 * Knows no conversation. */

import { byId, count, element, number } from "./dom.js";

const HALF_S = 0.25; // in which the light of a token halves
const DARK = 0.03; // at which it is out
const TALLEST = 380; // CSS pixels of the grid
const MOST_SHOWN = 5; // of those that are used most

/** What the tokens of one answer chose. `shape`: {n_layers, n_experts, n_used, dtype}. */
export class Touched {
  constructor(shape) {
    this.shape = shape;
    this.counts = new Uint32Array(shape.n_layers * shape.n_experts);
    this.last = []; // cells of the last token
    this.tokens = 0; // that were drawn
    this.cells = 0; // experts with at least one token
    this.most = 0; // tokens of one
  }

  /** One token's experts, base64 of [n_layers, n_used] ids; null where nobody drew it. */
  add(base64) {
    if (base64 === null) return;
    const { n_experts, n_used, dtype } = this.shape;
    const data = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
    const ids = dtype === "uint16" ? new Uint16Array(data.buffer) : data;
    this.last = Array.from(ids, (id, i) => Math.floor(i / n_used) * n_experts + id);
    for (const cell of this.last) {
      const n = ++this.counts[cell];
      if (n === 1) this.cells++;
      if (n > this.most) this.most = n;
    }
    this.tokens++;
  }

  /** "Layer 2, expert 17: 40 of 128 tokens" */
  describe(cell) {
    const { n_experts } = this.shape;
    const where = `Layer ${Math.floor(cell / n_experts)}, expert ${cell % n_experts}`;
    return `${where}: ${number(this.counts[cell])} of ${count(this.tokens, "token")}`;
  }

  summary() {
    const { n_layers, n_experts, n_used } = this.shape;
    const per = `Each token goes through ${n_used} of ${n_experts} experts in each of ${n_layers} layers.`;
    if (!this.tokens) return per;
    const share = Math.round((100 * this.cells) / this.counts.length);
    return `${number(this.cells)} of ${number(this.counts.length)} touched (${share} %). ${per}`;
  }

  /** Cells of those that are used most. */
  busiest() {
    const found = [];
    for (let cell = 0; cell < this.counts.length; cell++) {
      const n = this.counts[cell];
      if (!n || (found.length === MOST_SHOWN && n <= this.counts[found.at(-1)])) continue;
      found.push(cell);
      found.sort((a, b) => this.counts[b] - this.counts[a] || a - b);
      found.length = Math.min(found.length, MOST_SHOWN);
    }
    return found;
  }
}

/** The grid on the page: rows are layers, columns experts. */
export class Grid {
  constructor() {
    this.canvas = byId("grid");
    this.cells = document.createElement("canvas"); // a pixel for each expert
    this.touched = null;
    this.light = new Float32Array(0); // of each cell: 1 when a token has just gone through
    this.cursor = null;
    this.frame = 0; // of the animation; 0: none is asked for
    this.at = 0; // time of the last one
    this.isStill = matchMedia("(prefers-reduced-motion: reduce)");
    new ResizeObserver(() => this.draw()).observe(this.canvas.parentElement);
    document.addEventListener("theme", () => this.draw());
    this.canvas.addEventListener("pointermove", (event) => this.point(this.cellAt(event)));
    this.canvas.addEventListener("pointerleave", () => this.point(null));
    this.canvas.addEventListener("blur", () => this.point(null));
    this.canvas.addEventListener("keydown", (event) => this.move(event));
  }

  /** Shows an answer's counts from now on. */
  show(touched) {
    this.touched = touched;
    this.light = new Float32Array(touched.counts.length);
    const { n_layers, n_experts } = touched.shape;
    this.cells.width = n_experts;
    this.cells.height = n_layers;
    byId("last-expert").textContent = String(n_experts - 1);
    byId("experts").hidden = false;
    this.point(null);
    this.tell();
    this.draw();
  }

  /** Tokens came: the last one's cells light up. */
  flash() {
    const fade = this.isStill.matches ? 0 : 0.5;
    for (let i = 0; i < this.light.length; i++) this.light[i] *= fade; // of many tokens a second, the last few
    for (const cell of this.touched.last) this.light[cell] = 1;
    this.frame ||= requestAnimationFrame((now) => this.animate(now));
  }

  animate(now) {
    const fade = this.isStill.matches || !this.at ? 1 : 0.5 ** ((now - this.at) / 1000 / HALF_S);
    let isLit = false;
    for (let i = 0; i < this.light.length; i++) {
      this.light[i] *= fade;
      if (this.light[i] < DARK) this.light[i] = 0;
      else isLit = true;
    }
    this.draw();
    this.tell();
    const goesOn = isLit && !this.isStill.matches;
    this.at = goesOn ? now : 0;
    this.frame = goesOn ? requestAnimationFrame((later) => this.animate(later)) : 0;
  }

  tell() {
    const { touched } = this;
    byId("touched").textContent = touched.summary();
    byId("most").replaceChildren(...touched.busiest().map((cell) => element("li", "", touched.describe(cell))));
    this.canvas.setAttribute("aria-label", `Layers by experts. ${touched.summary()}`);
    if (this.cursor !== null) this.point(this.cursor);
  }

  draw() {
    const { canvas, touched } = this;
    const room = canvas.parentElement.clientWidth;
    if (!touched || !room) return;
    const { n_layers, n_experts } = touched.shape;
    const density = devicePixelRatio || 1;
    const fit = (room * density) / n_experts;
    const width = fit < 4 ? fit : Math.floor(fit); // pixels of a cell; small ones are not all as wide
    const height = Math.round(density * Math.max(3, Math.min(28, TALLEST / n_layers)));
    const size = [Math.floor(width * n_experts), height * n_layers];
    if (canvas.width !== size[0] || canvas.height !== size[1]) {
      [canvas.width, canvas.height] = size;
      canvas.style.width = canvas.nextElementSibling.style.width = `${canvas.width / density}px`;
      canvas.style.height = `${canvas.height / density}px`;
    }
    const style = getComputedStyle(canvas);
    this.paint(rgb(style.backgroundColor), rgb(style.color), rgb(style.borderTopColor));
    const context = canvas.getContext("2d");
    context.imageSmoothingEnabled = false;
    context.drawImage(this.cells, 0, 0, canvas.width, canvas.height);
    context.fillStyle = getComputedStyle(canvas.parentElement).backgroundColor; // gaps between the cells
    const gap = Math.max(1, Math.round(density / 2));
    if (width >= 4 * gap) for (let i = 1; i <= n_experts; i++) context.fillRect(i * width - gap, 0, gap, canvas.height);
    if (height >= 4 * gap) for (let i = 1; i <= n_layers; i++) context.fillRect(0, i * height - gap, canvas.width, gap);
    if (this.cursor === null) return;
    const [x, y] = [this.cursor % n_experts, Math.floor(this.cursor / n_experts)];
    context.strokeStyle = style.borderTopColor;
    context.lineWidth = 2 * density;
    context.strokeRect(x * width, y * height, width, height);
  }

  /** A pixel for each cell: from `none` to `often` by the root of its count, and towards `now` by its light. */
  paint(none, often, now) {
    const { counts, most } = this.touched;
    const context = this.cells.getContext("2d");
    const image = context.createImageData(this.cells.width, this.cells.height);
    for (let i = 0; i < counts.length; i++) {
      const share = counts[i] ? 0.15 + 0.85 * Math.sqrt(counts[i] / most) : 0;
      for (let c = 0; c < 3; c++) {
        const still = none[c] + (often[c] - none[c]) * share;
        image.data[4 * i + c] = still + (now[c] - still) * this.light[i];
      }
      image.data[4 * i + 3] = 255;
    }
    context.putImageData(image, 0, 0);
  }

  cellAt(event) {
    const box = this.canvas.getBoundingClientRect();
    const { n_layers, n_experts } = this.touched.shape;
    const x = Math.floor(((event.clientX - box.left) / box.width) * n_experts);
    const y = Math.floor(((event.clientY - box.top) / box.height) * n_layers);
    return x < 0 || y < 0 || x >= n_experts || y >= n_layers ? null : y * n_experts + x;
  }

  /** Arrow keys go from cell to cell. */
  move(event) {
    const { n_layers, n_experts } = this.touched.shape;
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -n_experts, ArrowDown: n_experts }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    const cell = this.cursor === null ? 0 : this.cursor + step;
    if (cell >= 0 && cell < n_layers * n_experts) this.point(cell);
  }

  point(cell) {
    const isMoved = this.cursor !== cell;
    this.cursor = cell;
    byId("readout").textContent = cell === null ? "" : this.touched.describe(cell);
    if (isMoved && !this.frame) this.draw();
  }
}

/** Red, green and blue, 0 to 255, of a computed color. */
function rgb(color) {
  return color.match(/[\d.]+/g).slice(0, 3).map(Number);
}
