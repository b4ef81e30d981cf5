// The message box: text, attached files, and how full the context is.

import { $, button, chooseFiles, fail, make } from "./dom.js";

const MAX_FILE = 2 ** 20;  // bytes of one file; the server takes 8 MiB in a request
const MAX_FILES = 8;
const MAX_TOTAL = 4 * 2 ** 20;
const TEXT_FILES = ".txt,.md,.markdown,.csv,.tsv,.json,.jsonl,.yaml,.yml,.toml,.ini,.log,.xml,.html,.css,.js,.ts,.py,.c,.h,.cpp,.go,.rs,.java,.sh,.sql,text/*";

export class Composer {
  /** `send(text, files)` returns whether the message was taken. */
  constructor({ send, stop }) {
    this.files = [];
    this.send = send;
    $("ask").addEventListener("submit", (event) => { event.preventDefault(); this.#submit(); });
    $("stop").addEventListener("click", stop);
    $("question").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); this.#submit(); }
    });
    $("question").addEventListener("input", () => this.#grow());
    $("attach").addEventListener("click", async () => this.add(await chooseFiles({ multiple: true, accept: TEXT_FILES })));
    const box = $("ask");
    box.addEventListener("dragover", (event) => event.preventDefault());
    box.addEventListener("drop", (event) => { event.preventDefault(); this.add([...event.dataTransfer.files]); });
    $("question").addEventListener("paste", (event) => {
      const files = [...event.clipboardData.files];
      if (files.length) { event.preventDefault(); this.add(files); }
    });
  }

  #submit() {
    const text = $("question").value.trim();
    if ((!text && !this.files.length) || !this.send(text, this.files)) return;
    $("question").value = "";
    this.files = [];
    this.#drawFiles();
    this.#grow();
  }

  #grow() {
    const box = $("question");
    box.style.height = "auto";
    box.style.height = `${box.scrollHeight + 2}px`;
  }

  /** Attach text files; a refusal names the file and the limit. */
  async add(files) {
    const refused = [];
    for (const file of files) {
      const total = this.files.reduce((sum, { text }) => sum + text.length, 0);
      if (this.files.length >= MAX_FILES) refused.push(`${file.name}: at most ${MAX_FILES} files.`);
      else if (file.size > MAX_FILE) refused.push(`${file.name} has ${(file.size / 2 ** 20).toFixed(1)} MiB; the limit is 1 MiB.`);
      else if (total + file.size > MAX_TOTAL) refused.push(`${file.name}: the files have more than 4 MiB together.`);
      else {
        try {
          const text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
          if (text.includes("\0")) throw new TypeError("binary");
          this.files.push({ name: file.name, text });
        } catch {
          refused.push(`${file.name} is not a text in UTF-8.`);
        }
      }
    }
    fail(refused.join(" "));
    this.#drawFiles();
    $("question").focus();
  }

  #drawFiles() {
    $("files").replaceChildren(...this.files.map((file) => make("li", {}, file.name, button("×", () => {
      this.files = this.files.filter((other) => other !== file);
      this.#drawFiles();
    }, { class: "quiet", "aria-label": `Remove ${file.name}` }))));
    $("files").hidden = !this.files.length;
  }

  setBusy(isBusy) {
    $("send").hidden = isBusy;
    $("stop").hidden = !isBusy;
    $("log").setAttribute("aria-busy", String(isBusy));
  }

  /** Show how many tokens of the context the conversation has; null hides the meter. */
  showContext(tokens, limit) {
    const isKnown = tokens != null && limit > 0;
    $("context").hidden = !isKnown;
    if (!isKnown) return;
    $("context-meter").max = limit;
    $("context-meter").value = Math.min(tokens, limit);
    $("context-text").textContent = `${tokens.toLocaleString("en")} of ${limit.toLocaleString("en")} tokens`;
  }
}
