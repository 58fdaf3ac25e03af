// What the chat cell does with a page: elements, icons, the clipboard, files, a new cell of the notebook. chat_widget.js
// follows in the same module (see chat_widget.py). No string is ever read as markup: children that are strings become text.

const ICONS = {
  undo: "M9 14 4 9l5-5M4 9h10a6 6 0 0 1 0 12h-3", trash: "M4 7h16M9 7V4h6v3M6 7l1 13h10l1-13",
  copy: "M9 9h11v11H9zM15 9V4H4v11h5", edit: "m4 20 1-5L16 4l4 4L9 19zM14 6l4 4",
  regenerate: "M20 11a8 8 0 1 0-2 6M20 4v7h-7", send: "M4 12 21 4l-5 17-4-7zM12 14l9-10", stop: "M6 6h12v12H6z",
};
const VIEW = "application/vnd.jupyter.widget-view+json";

/** An element. props: attributes, `on...` listeners; children: elements, or strings, which become text. */
function h(tag, props, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props ?? {})) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

/** A text with its {names} filled in. */
const fill = (text, values) => text.replace(/\{(\w+)\}/g, (_, name) => values[name]);

function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

/** What was said, with what stands between three backquotes as a block of code. */
function words(text) {
  const parts = text.split(/^[ \t]*```[^\n`]*\n?/m);
  return parts.map((part, i) => (i % 2 ? h("pre", { class: "glm3kit-code" }, part.replace(/\n$/, "")) : part))
    .filter((part) => typeof part !== "string" || part.trim())
    .map((part) => (typeof part === "string" ? h("div", { class: "glm3kit-words" }, part.trim()) : part));
}

async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = h("textarea", { class: "glm3kit-hidden" });  // a page over plain http has no clipboard
  area.value = text;
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

function download(name, text) {
  const url = URL.createObjectURL(new Blob([text], { type: "text/plain;charset=utf-8" }));
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** Put a new code cell below the one that shows this widget; false where the page is no JupyterLab notebook. */
function insertCell(model, code) {
  const notebook = model.widget_manager?.context?.model?.sharedModel;
  const id = model.get("state").model_id;
  try {
    const here = notebook.cells.findIndex((cell) =>
      (cell.toJSON().outputs ?? []).some((output) => output.data?.[VIEW]?.model_id === id));
    const below = here < 0 ? notebook.cells.length : here + 1;
    notebook.insertCell(below, { cell_type: "code", source: code, metadata: { trusted: true } });
    return true;
  } catch (error) {  // another front end, or a JupyterLab before 4
    console.warn("glm3kit: no cell was inserted:", error);
    return false;
  }
}
