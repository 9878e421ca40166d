/* A question and an answer as they stand on the page. Ask nothing and keep nothing. */

import { clone, copies, count, number, seconds } from "./dom.js";
import { render } from "./markdown.js";

/** The node of a question. */
export function userTurn(text) {
  const node = clone("user-turn");
  node.querySelector(".text").textContent = text;
  return node;
}

/** An answer: `message` is what the server will get back, with what only the page knows in `message.own`;
 * `onAgain` and `onTouched` are called for its buttons. */
export class AnswerTurn {
  constructor(message, onAgain, onTouched) {
    this.message = message;
    this.message.own ??= {};
    this.touched = null; // experts, where they are known
    this.node = clone("answer-turn");
    this.frame = 0;
    this.isOpen = false; // whether it goes on
    copies(this.part("footer .copy"), () => this.message.content);
    this.part(".again").addEventListener("click", onAgain);
    this.part("button.touched").addEventListener("click", onTouched);
  }

  part(selector) {
    return this.node.querySelector(selector);
  }

  begin() {
    this.isOpen = true;
    this.update();
  }

  /** Nothing more comes; `how`: "stopped", "failed" or nothing in particular, `why` in words. */
  end(how = "", why = "") {
    this.isOpen = false;
    Object.assign(this.message.own, { how, why });
    this.update();
  }

  /** How far the prompt is read. */
  progress({ processed, total }) {
    const bar = this.part("progress");
    bar.hidden = false;
    Object.assign(bar, { max: total, value: processed });
    this.part(".what").textContent = `Reading ${number(processed)} of ${count(total, "token")}`;
  }

  think(text) {
    this.thinkingFrom ??= performance.now();
    this.message.reasoning_content += text;
    this.later();
  }

  say(text) {
    this.closeThinking();
    this.message.content += text;
    this.later();
  }

  closeThinking() {
    if (this.thinkingFrom === undefined) return;
    this.message.own.thought_s ??= (performance.now() - this.thinkingFrom) / 1000;
  }

  /** Shows what has come, once for all that comes before the next frame. */
  later() {
    this.frame ||= requestAnimationFrame(() => this.update());
  }

  update() {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    const { content, reasoning_content: thinking, own } = this.message;
    this.node.setAttribute("aria-busy", String(this.isOpen));
    this.part(".waiting").hidden = !this.isOpen || Boolean(content || thinking);
    this.part(".thinking").hidden = !thinking;
    this.part("summary").textContent = this.thinkingTitle();
    this.part(".thinking").classList.toggle("live", this.isOpen && !content);
    if (thinking) render(this.part(".thinking .text"), thinking);
    render(this.part(".content"), content);
    this.part(".note").hidden = !own.why;
    this.part(".note").textContent = own.why ?? "";
    this.part(".note").classList.toggle("bad", own.how === "failed");
    this.part("footer").hidden = this.isOpen;
    this.part("footer .copy").hidden = !content;
    this.part("button.touched").hidden = !this.touched?.tokens;
    this.part(".cost").textContent = own.cost ?? "";
    this.onUpdate?.();
  }

  thinkingTitle() {
    const { thought_s } = this.message.own;
    if (this.isOpen && thought_s === undefined) return "Thinking…";
    return thought_s === undefined ? "Thoughts" : `Thought for ${seconds(thought_s)}`;
  }
}
