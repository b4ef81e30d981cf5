// The data in the browser: conversations and their messages in IndexedDB, settings and the key in localStorage.

// Several servers may share an origin, each under a path of its own.
const BASE = new URL(".", document.baseURI).pathname;
const channel = "BroadcastChannel" in window ? new BroadcastChannel(`pyllm ${BASE}`) : null;

let database = null;

const settled = (request) => new Promise((resolve, reject) => {
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});

/** Open the database; false if the browser keeps nothing here, as in some private windows. */
export async function openStore() {
  try {
    const request = indexedDB.open(`pyllm ${BASE}`, 1);
    request.onupgradeneeded = () => {
      request.result.createObjectStore("conversations", { keyPath: "id" });
      request.result.createObjectStore("messages", { keyPath: "id" }).createIndex("conversation", "conversation");
    };
    database = await settled(request);
    return true;
  } catch {
    return false;
  }
}

function stores(mode, ...names) {
  const transaction = database.transaction(names, mode);
  return names.map((name) => transaction.objectStore(name));
}

/** Write, and resolve when it is on the disk. */
async function write(names, change) {
  if (!database) return;
  try {
    const transaction = database.transaction(names, "readwrite");
    change(...names.map((name) => transaction.objectStore(name)));
    transaction.commit();  // now: the page may be about to close
    await new Promise((resolve, reject) => {
      transaction.oncomplete = resolve;
      transaction.onerror = transaction.onabort = () => reject(transaction.error);
    });
  } catch (error) {
    window.dispatchEvent(new CustomEvent("not-kept", { detail: error?.message ?? String(error) }));
  }
  if (names.includes("conversations")) channel?.postMessage("changed");
}

export async function listConversations() {
  if (!database) return [];
  const [conversations] = stores("readonly", "conversations");
  return settled(conversations.getAll());
}

export async function loadMessages(conversation) {
  if (!database) return [];
  const [messages] = stores("readonly", "messages");
  return settled(messages.index("conversation").getAll(conversation));
}

export const putConversation = (conversation) => write(["conversations"], (store) => store.put(conversation));
export const putMessage = (message) => write(["messages"], (store) => store.put(message));
export const deleteMessage = (id) => write(["messages"], (store) => store.delete(id));

/** Write whole conversations, or undo their deletion. */
export function putAll(conversations, messages) {
  return write(["conversations", "messages"], (first, second) => {
    for (const each of conversations) first.put(each);
    for (const each of messages) second.put(each);
  });
}

export async function deleteConversation(id) {
  const messages = await loadMessages(id);
  await write(["conversations", "messages"], (first, second) => {
    first.delete(id);
    for (const message of messages) second.delete(message.id);
  });
}

/** The ids of the conversations in which a message contains `text`, in any case. */
export async function search(text) {
  const found = new Set();
  if (!database) return found;
  const wanted = text.toLowerCase();
  const [messages] = stores("readonly", "messages");
  const request = messages.openCursor();
  return new Promise((resolve, reject) => {
    request.onerror = () => reject(request.error);
    request.onsuccess = () => {
      const cursor = request.result;
      if (!cursor) return resolve(found);
      if (cursor.value.content?.toLowerCase().includes(wanted)) found.add(cursor.value.conversation);
      cursor.continue();
    };
  });
}

/** Call `listener` when another tab has changed the list of conversations. */
export const onChangeElsewhere = (listener) => channel?.addEventListener("message", listener);

function keep(storage, name, value) {
  try {
    if (value == null || value === "") storage.removeItem(`pyllm ${BASE} ${name}`);
    else storage.setItem(`pyllm ${BASE} ${name}`, value);
  } catch { /* full or forbidden: it is kept until the page is closed, in memory */ }
}

function read(storage, name) {
  try {
    return storage.getItem(`pyllm ${BASE} ${name}`);
  } catch {
    return null;
  }
}

export const saveSettings = (settings) => keep(localStorage, "settings", JSON.stringify(settings));

export function loadSettings() {
  try {
    return JSON.parse(read(localStorage, "settings")) ?? {};
  } catch {
    return {};
  }
}

let key = read(localStorage, "key") ?? read(sessionStorage, "key") ?? "";

export const apiKey = () => key;

/** Keep the key in this browser, or only until the tab is closed. */
export function setApiKey(value, remember) {
  key = value;
  keep(localStorage, "key", remember ? value : "");
  keep(sessionStorage, "key", remember ? "" : value);
}

export const isKeyRemembered = () => Boolean(read(localStorage, "key"));
