// The dialog with what a LoRA file, and the files beside it, say about themselves.
import { api } from "../../scripts/api.js";
import { h, short, text } from "./page.js";

const request = (kind, name) => api.fetchApi(`/legomole/lora/${kind}?name=${encodeURIComponent(name)}`).then((answer) => answer.json());

const size = (bytes) => `${(bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0)} MB`;

/** A button with a word; pressing it copies the word. */
function word(value) {
  return h("button", {
    type: "button", className: "lm-word", title: text("copy"), on: { click: () => navigator.clipboard?.writeText(value) },
  }, value);
}

export const toPercent = (share) => Math.round(share * 1e4) / 100;

/** The inputs for the part of the sampling steps in which a LoRA acts, in percent. */
function stepsInputs({ start, end }, change) {
  const steps = { start, end };
  const input = (key, least, most) => h("input", {
    type: "number", className: `lm-${key}`, min: 0, max: 100, step: 1, value: toPercent(steps[key]),
    title: text(`${key}Help`), aria: { label: text(`${key}Help`) },
    on: {
      change: ({ target }) => {
        const percent = Number.isFinite(target.valueAsNumber) ? Math.round(target.valueAsNumber * 100) / 100 : toPercent(steps[key]);
        steps[key] = Math.min(Math.max(percent, least()), most()) / 100;
        target.value = toPercent(steps[key]);
        change({ ...steps });
      },
    },
  });
  return [
    input("start", () => 0, () => toPercent(steps.end) - 1), "–", input("end", () => toPercent(steps.start) + 1, () => 100), "%",
  ];
}

/**
 * Show the dialog of a row.
 * @param entry The row: its file's `name`, and what the user can change here: `words`, `start` and `end`.
 * @param change Called with the values that the user has changed.
 */
export async function showInfo({ name, words: own, start, end }, change) {
  const dialog = h("dialog", { className: "lm lm-dialog", aria: { label: short(name) } });
  const close = h("button", { type: "button", className: "lm-close", title: text("close"), on: { click: () => dialog.close() } }, "✕");
  const body = h("dl");
  dialog.append(h("header", {}, h("strong", {}, short(name)), close), body);
  dialog.addEventListener("keydown", (event) => event.stopPropagation()); // the page's shortcuts
  dialog.addEventListener("click", ({ target }) => target === dialog && dialog.close()); // beside the dialog
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();

  const add = (key, ...content) => content.length && content[0] !== "" && body.append(h("dt", {}, text(key)), h("dd", {}, ...content));
  const file = await request("details", name);
  add("file", name);
  if (file.error) return add("problem", file.error);
  const image = file.preview ? api.apiURL(`/legomole/lora/preview?name=${encodeURIComponent(name)}`) : file.thumbnail;
  if (image) body.before(h("img", { src: image, alt: text("preview") }));
  add("title", file.title);
  add("base", file.base);
  add("trainer", file.trainer);
  add("words", ...(file.words.length > 1 ? [...file.words, file.words.join(", ")] : file.words).map(word));
  add("ownWords", h("input", {
    type: "text", value: own, placeholder: file.words.join(", "), title: text("ownWordsHelp"),
    on: { change: ({ target }) => change({ words: target.value.trim() }) },
  }));
  add("steps", ...stepsInputs({ start, end }, change));
  add("tags", ...file.tags.map(word));
  add("notes", file.notes);
  add("size", size(file.bytes));
  const hash = h("code", {}, file.sha256 || text("computing"));
  add("hash", hash);
  if (!file.sha256) hash.textContent = (await request("hash", name)).sha256 ?? "";
}
