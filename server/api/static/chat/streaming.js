// Markdown that is still being written. Finished blocks are never parsed or touched again, and the open block is kept
// small, so a chunk costs the same at the beginning and at the end of a long answer.

import { counters } from "./dom.js";
import { codeBlock, highlight, parse, render, renderAll } from "./markdown.js";

const MAX_OPEN = 2000;  // characters of the open block; a longer one is split where its kind allows
const LINES_PER_GROUP = 40;  // of code: the browser lays out a group again when a line is added
const BLOCKS_PER_PART = 20;
const FENCE = /^( {0,3})(`{3,}|~{3,})(.*)$/;

/** The top-level blocks of parsed tokens, with their first lines. */
function blocksOf(tokens) {
  const blocks = [];
  let depth = 0;
  tokens.forEach((token, index) => {
    if (depth === 0) blocks.push({ type: token.type, first: token.map?.[0] ?? 0, end: token.map?.[1] ?? 0, from: index, token });
    depth += token.nesting;
    blocks.at(-1).to = index + 1;
  });
  return blocks;
}

/** The position at which line `line` begins. */
function offsetOf(text, line) {
  let position = 0;
  for (; line > 0; line--) {
    const end = text.indexOf("\n", position);
    if (end < 0) return text.length;
    position = end + 1;
  }
  return position;
}

export class StreamingMarkdown {
  constructor(root) {
    this.root = root;
    this.part = null;  // of the root, for the next blocks
    this.env = {};  // link definitions of all blocks so far
    this.tail = "";  // the text that is not settled yet
    this.held = "";
    this.open = [];  // the nodes that show that text
    this.code = null;  // the open fenced block
    this.joined = null;  // the table or paragraph whose next part the tail is
    this.needsWhole = false;  // parts were drawn in a way that only the whole text shows right
    this.parsedLength = 0;  // of a tail that cannot be split
    this.raw = null;  // shows the text after that length, unparsed
    this.rawLength = 0;
  }

  append(text) {
    const all = this.held + text;
    this.held = all.endsWith("\r") ? "\r" : "";  // the half of a line end
    this.tail += all.slice(0, all.length - this.held.length).replace(/\r\n?/g, "\n");
  }

  /** Show all appended text; call it once a frame. */
  draw() {
    for (;;) {
      if (this.code && !this.#drawCode()) return;
      if (!this.#drawBlocks()) return;
    }
  }

  /** The text is complete; `text` is all of it. */
  end(text) {
    this.draw();
    if (this.needsWhole) this.root.replaceChildren(renderAll(text));  // as one piece, once
    else if (this.code) {
      if (this.tail && !this.code.partial && !this.code.closing.test(this.tail)) this.#addCode(this.tail);
      this.#closeCode();
    } else {
      this.#replaceOpen(null);
      this.#place(render(parse(this.#header() + this.tail, this.env), this.env));
    }
    this.tail = "";
    this.open = [];
  }

  #header() { return this.joined?.header ?? ""; }

  #replaceOpen(fragment) {
    counters.nodesTouched += this.open.length;
    for (const node of this.open) node.remove();
    this.open = fragment ? this.#place(fragment) : [];
  }

  /** Add a fragment at the end; its first block continues the joined one. Returns the added nodes. */
  #place(fragment) {
    const added = [];
    if (this.joined) {
      const { kind, target } = this.joined;
      const first = fragment.firstElementChild;
      const part = kind === "table" ? first?.querySelector("tbody") : first?.matches("p") ? first : null;
      if (part) {
        added.push(...part.childNodes);
        target.append(...part.childNodes);
      }
      if (part || kind === "table") first?.remove();
    }
    added.push(...fragment.childNodes);
    this.#add(fragment);
    return added;
  }

  /** Add a node in a part of a few blocks: the browser lays out the other parts no more. */
  #add(node) {
    if (!this.part || (!this.joined && this.part.childElementCount >= BLOCKS_PER_PART)) {
      this.part = document.createElement("div");
      this.root.append(this.part);
    }
    this.part.append(node);
  }

  /** Parse the tail, settle its finished blocks and show the rest; true if there is more to do. */
  #drawBlocks() {
    if (this.parsedLength && this.tail.length < 1.5 * this.parsedLength) {
      this.#showRaw();
      return false;
    }
    const source = this.#header() + this.tail;
    const env = { references: { ...this.env.references } };  // an unfinished link definition must not stay
    const tokens = parse(source, env);
    const hasDefinitions = Object.keys(env.references).length > 0;
    if (hasDefinitions) this.needsWhole = true;  // a use above its definition was drawn as text
    const blocks = blocksOf(tokens);
    if (!blocks.length) {
      this.#replaceOpen(null);
      return false;
    }
    const complete = source.split("\n").length - 1;  // lines; a block that begins in the next one may still change
    const keep = Math.max(0, blocks.at(-1).first < complete ? blocks.length - 1 : blocks.length - 2);
    this.#replaceOpen(null);
    if (keep > 0) {
      this.#place(render(tokens.slice(0, blocks[keep].from), env));
      this.joined = null;
      const end = offsetOf(source, blocks[keep].first);
      if (hasDefinitions) parse(source.slice(0, end), this.env);
      this.tail = source.slice(end);
      this.parsedLength = 0;
    }
    const block = blocks[keep];
    if (keep === blocks.length - 1 && block.type === "fence" && block.first < complete) {
      this.#openCode(block);
      return true;
    }
    if (this.tail.length > MAX_OPEN && keep === blocks.length - 1 && this.#split(tokens, block, source, complete)) return true;
    this.parsedLength = this.tail.length > MAX_OPEN ? this.tail.length : 0;
    this.open = this.#place(render(tokens.slice(block.from), env, false));
    return false;
  }

  /** Settle a part of a long open block. */
  #split(tokens, block, source, complete) {
    const inside = tokens.slice(block.from, block.to);
    const firstLines = (type) => inside.filter((token) => token.type === type && token.map && token.map[0] < complete).map((token) => token.map[0]);
    let line = 0;
    if (/_list_open$/.test(block.type)) line = inside.filter((token) => token.level === 1 && token.type === "list_item_open" && token.map[0] < complete).at(-1)?.map[0];
    else if (block.type === "table_open") line = firstLines("tr_open").at(-1);
    else if (block.type === "paragraph_open") return this.#splitParagraph(source.slice(offsetOf(source, block.first)));
    if (!line || line <= block.first + (block.type === "table_open" ? 2 : 0)) return false;
    const position = offsetOf(source, line);
    const start = offsetOf(source, block.first);
    this.#settle(source.slice(start, position));
    if (block.type === "table_open" && this.joined?.kind !== "table") {
      const bodies = this.part.querySelectorAll("tbody");
      this.joined = { kind: "table", target: bodies[bodies.length - 1], header: source.slice(start, offsetOf(source, block.first + 2)) };
    }
    this.tail = source.slice(position);
    return true;
  }

  #splitParagraph(text) {
    // The rest must read as a paragraph again: it begins with a letter, after a blank if there is one.
    const from = Math.max(0, text.length - 1000);
    const blank = [...text.slice(from, -200).matchAll(/\s(?=\p{L}{2})/gu)].at(-1);
    const at = blank ? from + blank.index + 1 : text.length - 200;
    if (!/^\p{L}/u.test(text.slice(at))) return false;
    const before = text[at - 1];
    this.#settle(text.slice(0, at));
    if (this.joined?.kind !== "paragraph") this.joined = { kind: "paragraph", target: this.part.lastElementChild, header: "" };
    if (/\s/.test(before)) this.joined.target.append(before === "\n" ? document.createElement("br") : " ");
    this.tail = text.slice(at);
    return true;
  }

  #settle(text) {
    this.needsWhole = true;
    this.#place(render(parse(text, this.env), this.env));
    this.parsedLength = 0;
  }

  /** A long block of a kind that is not split: text since its parsing is shown unparsed. */
  #showRaw() {
    if (!this.raw?.parentNode) {
      this.raw = document.createElement("span");
      this.rawLength = this.parsedLength;
      this.#add(this.raw);
      this.open.push(this.raw);
    }
    this.raw.append(this.tail.slice(this.rawLength));
    this.rawLength = this.tail.length;
    counters.nodesTouched += 1;
  }

  #openCode({ token }) {
    const line = this.tail.slice(0, this.tail.indexOf("\n"));
    const [, indent, mark] = FENCE.exec(line) ?? [, "", token.markup];
    const language = token.info.trim().split(/\s+/)[0] ?? "";
    const { element, code } = codeBlock(language);
    const closing = new RegExp(`^ {0,3}${mark[0] === "~" ? "~" : "`"}{${mark.length},}[ \\t]*$`);
    this.code = { code, language, closing, indent: new RegExp(`^ {0,${indent.length}}`), group: null, lines: 0, partial: null, inLine: false };
    this.#add(element);
    counters.nodesTouched += 1;
    this.tail = this.tail.slice(line.length + 1);
  }

  /** Add new text to the open code; true if the code has ended. */
  #drawCode() {
    const { code } = this;
    code.partial?.remove();
    code.partial = null;
    for (let end; (end = this.tail.indexOf("\n")) >= 0;) {
      const line = this.tail.slice(0, end);
      this.tail = this.tail.slice(end + 1);
      if (!code.inLine && code.closing.test(line)) {
        this.#closeCode();
        return true;
      }
      this.#addCode(`${code.inLine ? line : line.replace(code.indent, "")}\n`);
      code.inLine = false;
    }
    if (this.tail.length > MAX_OPEN) {  // too long for an end mark
      this.#addCode(this.tail);
      this.tail = "";
      code.inLine = true;
    } else if (this.tail && (code.inLine || !/^ {0,3}[`~]*[ \t]*$/.test(this.tail))) {
      code.partial = document.createTextNode(this.tail);
      code.code.append(code.partial);
      counters.nodesTouched += 1;
    }
    return false;
  }

  #addCode(text) {
    const { code } = this;
    if (!code.group || code.lines % LINES_PER_GROUP === 0) {
      code.group = document.createElement("span");
      code.group.className = "lines";
      code.code.append(code.group);
    }
    code.group.append(text);
    code.lines += 1;
    counters.nodesTouched += 1;
  }

  #closeCode() {
    const { code, language } = this.code;
    code.textContent = code.textContent;  // one node, without the groups
    highlight(code, language);
    this.code = null;
    this.open = [];
  }
}
