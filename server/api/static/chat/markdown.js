// Markdown to elements. HTML in the text stays text, nothing is loaded from other hosts, and DOMPurify has the last word.

import MarkdownIt from "../vendor/markdown-it/markdown-it.mjs";
import DOMPurify from "../vendor/dompurify/purify.mjs";
import { counters, copyButton, make } from "./dom.js";

const MAX_HIGHLIGHTED = 100000;  // characters of one block
const LANGUAGES = {
  bash: "bash", sh: "bash", zsh: "bash", shell: "shell", console: "shell", c: "c", h: "c", cpp: "cpp", "c++": "cpp", css: "css",
  diff: "diff", patch: "diff", go: "go", ini: "ini", toml: "ini", java: "java", javascript: "javascript", js: "javascript",
  jsx: "javascript", json: "json", jsonl: "json", markdown: "markdown", md: "markdown", python: "python", py: "python",
  rust: "rust", rs: "rust", sql: "sql", typescript: "typescript", ts: "typescript", tsx: "typescript",
  html: "xml", xml: "xml", svg: "xml", yaml: "yaml", yml: "yaml",
};
const SANITIZE = {
  ALLOWED_TAGS: ["a", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre", "s",
    "span", "strong", "table", "tbody", "td", "th", "thead", "tr", "ul"],
  ALLOWED_ATTR: ["class", "href", "rel", "start", "target", "title"],
  RETURN_DOM_FRAGMENT: true,
};

export const md = new MarkdownIt({ html: false, linkify: true, breaks: true });
md.linkify.set({ fuzzyLink: false, fuzzyEmail: false, fuzzyIP: false });
md.validateLink = (url) => /^(https?:\/\/|mailto:)/i.test(url);

const { rules } = md.renderer;

rules.link_open = (tokens, index, options, env, self) => {
  tokens[index].attrSet("rel", "noopener noreferrer");
  tokens[index].attrSet("target", "_blank");
  return self.renderToken(tokens, index, options);
};
// An image would be a request to another host: it becomes a link.
rules.image = (tokens, index) => {
  const { content, attrs } = tokens[index];
  const url = md.utils.escapeHtml(new Map(attrs).get("src"));
  return `<a href="${url}" rel="noopener noreferrer" target="_blank">${md.utils.escapeHtml(content || "image")}</a>`;
};
rules.th_open = rules.td_open = (tokens, index, options, env, self) => {
  const align = /text-align:(\w+)/.exec(tokens[index].attrGet("style") ?? "")?.[1];
  tokens[index].attrs = align ? [["class", `align-${align}`]] : null;
  return self.renderToken(tokens, index, options);
};
// The page has headings of its own, down to the name above each message.
rules.heading_open = (tokens, index) => `<h${Math.min(6, Number(tokens[index].tag[1]) + 2)}>`;
rules.heading_close = (tokens, index) => `</h${Math.min(6, Number(tokens[index].tag[1]) + 2)}>`;
rules.math_inline = rules.math_block = (tokens, index) => {
  const { content, block, markup } = tokens[index];
  const element = `<span class="math${markup ? " display" : ""}">${md.utils.escapeHtml(content)}</span>`;
  return block ? `<p>${element}</p>\n` : element;
};

const INLINE_MATH = [
  { open: "$$", close: "$$", display: true }, { open: "\\[", close: "\\]", display: true },
  { open: "\\(", close: "\\)" }, { open: "$", close: "$", tight: true },
];

md.inline.ruler.before("escape", "math", (state, silent) => {
  const { src, pos, posMax } = state;
  const kind = INLINE_MATH.find(({ open }) => src.startsWith(open, pos));
  if (!kind) return false;
  const begin = pos + kind.open.length;
  const end = src.indexOf(kind.close, begin);
  if (end <= begin || end + kind.close.length > posMax) return false;
  const content = src.slice(begin, end);
  // "$5 and $6" is about money: a formula touches its dollars, and no digit follows.
  if (kind.tight && (/^\s|\s$|\n/.test(content) || /\d/.test(src[end + 1] ?? ""))) return false;
  if (!silent) Object.assign(state.push("math_inline", "", 0), { content, markup: kind.display ? kind.open : "" });
  state.pos = end + kind.close.length;
  return true;
});

md.block.ruler.before("fence", "math", (state, startLine, endLine, silent) => {
  const lineOf = (line) => state.src.slice(state.bMarks[line] + state.tShift[line], state.eMarks[line]);
  const kind = INLINE_MATH.find(({ open, display }) => display && lineOf(startLine).startsWith(open));
  if (!kind || state.sCount[startLine] - state.blkIndent >= 4) return false;
  const found = [];
  for (let line = startLine; line < endLine; line++) {
    const text = line === startLine ? lineOf(line).slice(kind.open.length) : lineOf(line);
    const end = text.indexOf(kind.close);
    if (end >= 0) {
      if (text.slice(end + kind.close.length).trim()) return false;
      if (silent) return true;
      found.push(text.slice(0, end));
      const token = state.push("math_block", "", 0);
      Object.assign(token, { content: found.join("\n"), block: true, markup: kind.open, map: [startLine, line + 1] });
      state.line = line + 1;
      return true;
    }
    if (line > startLine && !text.trim()) return false;  // a formula has no empty line
    found.push(text);
  }
  return false;
}, { alt: ["paragraph", "reference", "blockquote", "list"] });

export function parse(text, env) {
  counters.charactersParsed += text.length;
  return md.parse(text, env);
}

/** Elements of parsed tokens; `isFinal` blocks get their colours and formulas. */
export function render(tokens, env, isFinal = true) {
  const fragment = DOMPurify.sanitize(md.renderer.render(tokens, md.options, env), SANITIZE);
  for (const pre of fragment.querySelectorAll("pre")) decorateCode(pre, isFinal);
  for (const table of fragment.querySelectorAll("table")) {
    const scroll = make("div", { class: "scroll", role: "region", "aria-label": "Table", tabindex: "0" });
    table.replaceWith(scroll);
    scroll.append(table);
  }
  const formulas = fragment.querySelectorAll(".math");
  if (formulas.length) draw(formulas);
  counters.nodesTouched += fragment.querySelectorAll("*").length;
  return fragment;
}

/** A whole text. */
export function renderAll(text) {
  const env = {};
  return render(parse(text, env), env);
}

function decorateCode(pre, isFinal) {
  const code = pre.firstElementChild;
  const language = /language-(\S+)/.exec(code?.className ?? "")?.[1] ?? "";
  const block = codeBlock(language);
  pre.replaceWith(block.element);
  block.code.textContent = code?.textContent ?? pre.textContent;
  if (isFinal) highlight(block.code, language);
}

/** The frame of a block of code, with its language and a button that copies it. */
export function codeBlock(language) {
  const code = make("code");
  const head = make("div", { class: "code-head" }, make("span", {}, language || "text"), copyButton(() => code.textContent, "Copy code"));
  return { element: make("div", { class: "code" }, head, make("pre", { tabindex: "0" }, code)), code };
}

let highlighter = null;

/** Colour code when there is time for it. */
export function highlight(code, language) {
  const name = LANGUAGES[language.toLowerCase()];
  if (!name || code.textContent.length > MAX_HIGHLIGHTED) return;
  const idle = window.requestIdleCallback ?? setTimeout;
  idle(async () => {
    highlighter ??= import("../vendor/highlight/core.js").then((module) => module.default);
    const hljs = await highlighter;
    if (!hljs.getLanguage(name)) hljs.registerLanguage(name, (await import(`../vendor/highlight/${name}.js`)).default);
    const { value } = hljs.highlight(code.textContent, { language: name, ignoreIllegals: true });
    code.replaceChildren(DOMPurify.sanitize(value, SANITIZE));
  });
}

let katex = null;
const FORMULA = {
  throwOnError: true, trust: false, maxExpand: 500, maxSize: 20, strict: "ignore",
  // In MathML these two would set a style attribute, which the page's policy forbids.
  macros: { "\\pmb": "\\boldsymbol{#1}", "\\fcolorbox": (context) => ({ tokens: context.consumeArgs(3)[2], numArgs: 0 }) },
};

function loadKatex() {
  const url = (name) => new URL(`../vendor/katex/${name}`, import.meta.url).href;
  document.head.append(make("link", { rel: "stylesheet", href: url("katex.css") }));
  katex = import("../vendor/katex/katex.js").then(() => { katex = window.katex; return katex; });
  return katex;
}

/** Draw formulas; until the library has loaded, or if it finds an error, their source is shown. */
function draw(formulas) {
  if (!katex) loadKatex();
  if (katex instanceof Promise) {
    katex.then(() => draw(formulas));
    return;
  }
  for (const element of formulas) {
    const source = element.textContent;
    try {
      const drawn = document.createElement("span");
      katex.render(source, drawn, { ...FORMULA, macros: { ...FORMULA.macros }, displayMode: element.classList.contains("display") });
      element.replaceChildren(...drawn.childNodes);
    } catch {
      element.textContent = source;
      element.classList.add("broken");
    }
  }
}
