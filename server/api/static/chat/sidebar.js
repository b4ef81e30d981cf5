// The list of conversations: choose, search, rename, delete, export and import.

import { $, button, chooseFiles, confirmed, download, fail, make, notify, plural } from "./dom.js";
import { search } from "./store.js";

const MAX_IMPORT = 200 * 2 ** 20;

export class Sidebar {
  /** `open` shows a conversation, `current` returns the one that is shown. */
  constructor(library, { open, current }) {
    this.library = library;
    this.open = open;
    this.current = current;
    this.found = null;  // ids of the conversations whose text matches the search
    $("search").addEventListener("input", () => this.#search());
    $("new").addEventListener("click", () => open(null));
    $("export-all").addEventListener("click", () => this.#export(library.sorted(), "pyllm-conversations.json"));
    $("import").addEventListener("click", () => this.#import());
    $("delete-all").addEventListener("click", () => this.#deleteAll());
  }

  async #search() {
    const wanted = $("search").value.trim();
    this.found = wanted.length > 1 ? await search(wanted) : null;
    if ($("search").value.trim() === wanted) this.draw();
  }

  draw() {
    const wanted = $("search").value.trim().toLowerCase();
    const shown = this.library.sorted().filter((each) => !wanted || each.title.toLowerCase().includes(wanted) || this.found?.has(each.id));
    $("conversations").replaceChildren(...shown.map((each) => this.#row(each)));
    $("none-found").textContent = shown.length ? "" : wanted ? "No conversation matches." : "No conversations yet.";
    $("none-found").hidden = shown.length > 0;
    const isEmpty = this.library.all.length === 0;
    $("export-all").disabled = $("delete-all").disabled = isEmpty;
  }

  #row(conversation) {
    const { title } = conversation;
    const isCurrent = conversation === this.current();
    const select = button(title, () => this.open(conversation), { class: "title", title, "aria-current": isCurrent ? "true" : null });
    if (conversation.run) select.prepend(make("span", { class: "busy", role: "img", "aria-label": "is being answered:" }));
    const more = make("details", { class: "menu" }, make("summary", { "aria-label": `Actions for ${title}` }, "⋯"));
    const act = (text, action) => button(text, () => { more.open = false; action(); });
    more.append(make("div", { class: "menu-items" },
      act("Rename", () => this.#rename(conversation, row)),
      act("Export", () => this.#export([conversation], `${title.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40) || "conversation"}.json`)),
      act("Delete", () => this.#delete(conversation))));
    more.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || !more.open) return;
      event.stopPropagation();
      more.open = false;
      more.firstElementChild.focus();
    });
    more.addEventListener("focusout", (event) => { if (!more.contains(event.relatedTarget)) more.open = false; });
    const row = make("li", {}, select, more);
    return row;
  }

  #rename(conversation, row) {
    const input = make("input", { "aria-label": "Name of the conversation", maxlength: "200" });
    input.value = conversation.record.title;
    let isDone = false;
    const done = (save) => {
      if (isDone) return;
      isDone = true;
      if (save && input.value.trim()) {
        conversation.record.title = input.value.trim();
        conversation.save();
      }
      this.draw();
      this.open(this.current());  // its title is above the messages too
    };
    input.addEventListener("keydown", (event) => {
      if (event.key === "Enter") done(true);
      if (event.key === "Escape") { event.stopPropagation(); done(false); }
    });
    input.addEventListener("blur", () => done(true));
    row.replaceChildren(input);
    input.select();
  }

  async #delete(conversation) {
    const isCurrent = conversation === this.current();
    const undo = await this.library.remove(conversation);
    if (isCurrent) this.open(null);
    this.draw();
    notify(`Deleted “${conversation.title}”.`, async () => {
      await undo();
      this.open(conversation);
    });
  }

  async #deleteAll() {
    const { all } = this.library;
    const question = `Delete ${plural(all.length, "conversation")} from this browser? Export them first if you may want them again.`;
    if (!(await confirmed(question, "Delete all"))) return;
    for (const conversation of [...all]) await this.library.remove(conversation);
    this.open(null);
    this.draw();
  }

  async #export(conversations, name) {
    download(name, "application/json", await this.library.export(conversations));
  }

  async #import() {
    const [file] = await chooseFiles({ accept: ".json,application/json" });
    if (!file) return;
    try {
      if (file.size > MAX_IMPORT) throw new Error(`The file has ${Math.round(file.size / 2 ** 20)} MiB; at most 200 are read.`);
      const count = await this.library.import(await file.text());
      notify(`Imported ${plural(count, "conversation")}.`);
      fail("");
    } catch (error) {
      fail(`${file.name} was not imported. ${error.message}`);
    }
    this.draw();
  }
}
