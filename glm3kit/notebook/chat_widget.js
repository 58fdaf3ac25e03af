// The page's side of the chat cell (see chat_widget.py). Everything that was said is put into the page as text nodes:
// no string is ever read as markup. What a person asks for goes to Python as {action, ...}; what comes back is drawn.

const SPEAKERS = ["user", "system", "observation"];

function firstLanguage() {
  return localStorage.getItem("glm3kit-language") ?? (navigator.language.startsWith("zh") ? "zh" : "en");
}

/** One view: its elements, and how they follow the model. */
class Chat {
  constructor(model, el) {
    this.model = model;
    this.language = firstLanguage();
    this.draft = { text: "", role: "user" };
    this.panel = null;  // the open one
    this.editing = null;  // the place of the message that is being edited
    // shortcuts of JupyterLab end here: Shift+Enter would run the cell
    this.root = h("div", { class: "glm3kit-chat", "data-lm-suppress-shortcuts": "true" });
    el.append(this.root);
    this.build();
  }

  get state() { return this.model.get("state"); }

  ask(action, more = {}) { this.model.send({ action, ...more }); }

  /** Everything anew, in the current language; the text that is being written stays. */
  build() {
    const t = (this.t = this.model.get("texts")[this.language]);
    this.root.lang = this.language === "zh" ? "zh-CN" : "en";
    this.shown = [];
    this.messages = h("div", { class: "glm3kit-messages" });
    this.after = h("div", { class: "glm3kit-after" });
    this.chips = h("div", { class: "glm3kit-chips" });
    this.panelBox = h("div", { class: "glm3kit-panel", hidden: true });
    this.root.replaceChildren(
      this.buildBar(), this.panelBox,
      h("div", { class: "glm3kit-log", role: "log", "aria-live": "off", "aria-label": t.conversation, tabindex: "0" },
        h("div", { class: "glm3kit-column" }, this.messages, this.after)),
      this.chips, this.buildComposer(), this.buildFooter());
    this.showPanel(this.panel);
    this.update();
  }

  button(name, label, onclick, more = {}) {
    const { help, class: kind = "", ...props } = more;
    return h("button", { type: "button", class: `glm3kit-button ${kind}`, title: help ?? label, "aria-label": label,
      onclick, ...props }, ICONS[name] ? icon(name) : null, more.bare ? null : h("span", null, label));
  }

  buildBar() {
    const t = this.t;
    this.tabs = Object.fromEntries(["settings", "tools", "sampling", "file"].map((name) => [name,
      this.button(name, t[name], () => this.showPanel(this.panel === name ? null : name), { class: "glm3kit-tab" })]));
    this.undo = this.button("undo", t.undo, () => this.ask("undo"),
      { help: t.undoHelp, class: "glm3kit-folds" });
    this.clear = this.button("trash", t.clear, () => this.ask("clear"),
      { help: t.clearHelp, class: "glm3kit-folds" });
    const language = this.button("", t.language, () => this.switchLanguage(),
      { help: t.languageName, class: "glm3kit-language" });
    return h("div", { class: "glm3kit-bar", role: "toolbar", "aria-label": t.title },
      h("div", { class: "glm3kit-title" }, t.title), ...Object.values(this.tabs), h("span", { class: "glm3kit-space" }),
      this.undo, this.clear, language);
  }

  buildComposer() {
    const t = this.t;
    this.role = h("select", { class: "glm3kit-role", "aria-label": t.role, title: t.role,
      onchange: () => { this.draft.role = this.role.value; this.markRole(); } },
    ...SPEAKERS.map((role) => h("option", { value: role }, t[role])));
    this.text = h("textarea", { class: "glm3kit-text", rows: "1", "aria-label": t.message, placeholder: t.placeholder,
      title: t.keys, oninput: () => { this.draft.text = this.text.value; this.fit(); },
      onkeydown: (event) => this.onKey(event, () => this.send()) });
    this.sendButton = this.button("send", t.send, () => this.send(), { class: "glm3kit-primary" });
    this.stopButton = this.button("stop", t.stop, () => this.ask("stop"), { class: "glm3kit-stop" });
    return this.composer = h("div", { class: "glm3kit-composer" },
      this.role, this.text, this.sendButton, this.stopButton);
  }

  buildFooter() {
    this.bar = h("div", { class: "glm3kit-used" });
    this.meter = h("div", { class: "glm3kit-meter", role: "meter", "aria-label": this.t.context, "aria-valuemin": "0" },
      this.bar);
    this.count = h("span", { class: "glm3kit-count" });
    this.status = h("span", { class: "glm3kit-status", role: "status" });
    return h("div", { class: "glm3kit-footer" }, this.meter, this.count, this.status);
  }

  switchLanguage() {
    this.language = this.language === "zh" ? "en" : "zh";
    localStorage.setItem("glm3kit-language", this.language);
    this.build();
  }

  // writing

  /** Enter sends, Shift+Enter breaks, an Enter that ends a composition (Chinese input) does neither. */
  onKey(event, send) {
    if (event.key === "Escape" && this.state.busy) this.ask("stop");
    if (event.key !== "Enter" || event.isComposing || event.keyCode === 229) return;
    event.preventDefault();
    if (!event.shiftKey) return send();
    const { target } = event;  // JupyterLab swallows line breaks typed with a modifier anywhere in a cell
    target.setRangeText("\n", target.selectionStart, target.selectionEnd, "end");
    target.dispatchEvent(new InputEvent("input", { bubbles: true }));
  }

  fit() {  // the text area grows with its text
    this.text.style.height = "auto";
    this.text.style.height = `${Math.min(this.text.scrollHeight + 2, 220)}px`;
  }

  markRole() { this.composer.dataset.role = this.role.value; }

  write(text, role) {
    this.draft = { text, role };
    this.text.value = text;
    this.role.value = role;
    this.markRole();
    this.fit();
  }

  send() {
    if (this.state.busy || !this.text.value.trim()) return;
    this.ask("send", { text: this.text.value, role: this.role.value });
    this.write("", "user");
    this.offered = null;
  }

  // panels

  showPanel(name) {
    const fields = () => [...this.panelBox.querySelectorAll("button, input, select, textarea, summary")];
    const focused = fields().indexOf(document.activeElement);
    this.panel = name;
    for (const [other, tab] of Object.entries(this.tabs)) tab.setAttribute("aria-expanded", String(other === name));
    this.panelBox.hidden = !name;
    this.panelBox.replaceChildren(...(name ? PANELS[name](this) : []));
    this.panelBox.setAttribute("role", "region");
    this.panelBox.setAttribute("aria-label", name ? this.t[name] : "");
    this.panelOf = this.panelState();
    if (focused >= 0) fields()[focused]?.focus();
  }

  /** What the panels show of the state: they are drawn again when that changes. */
  panelState() {
    const { system, tools, ask_first, sampling } = this.state;
    const refused = this.panel === "sampling" ? this.model.get("note") : "";
    return JSON.stringify([system, tools, ask_first, sampling, refused]);
  }

  // messages

  update() {
    const { state, t } = this, { busy } = state;
    const standing = this.model.get("messages"), growing = this.model.get("growing");
    const all = [...standing, ...growing];
    const last = all.length - 1;
    all.forEach((message, i) => this.place(i, message, {
      live: busy && growing.length > 0 && i === last,
      end: message.left_out && !all[i + 1]?.left_out,
      again: !busy && i === last && message.role === "assistant",
    }));
    for (const { node } of this.shown.splice(all.length)) node.remove();

    this.root.classList.toggle("glm3kit-busy", busy);
    this.after.replaceChildren(...this.buildAfter(all));
    this.buildChips(all);
    if (this.panel && this.panelOf !== this.panelState()) this.showPanel(this.panel);
    for (const control of this.panelBox.querySelectorAll("[data-idle]")) control.disabled = busy;
    this.tabs.tools.lastChild.textContent = state.tools.length ? `${t.tools} (${state.tools.length})` : t.tools;
    this.undo.disabled = this.clear.disabled = this.sendButton.disabled = busy;
    this.sendButton.hidden = busy;
    this.stopButton.hidden = !busy;
    this.stopButton.disabled = !busy;
    this.updateFooter();
    this.offer();
    if (this.text.value !== this.draft.text) this.write(this.draft.text, this.draft.role);
    this.markRole();
  }

  place(i, message, flags) {
    const editing = this.editing === message.at && !flags.live;
    const key = JSON.stringify([message, flags, editing]);
    const old = this.shown[i];
    if (old?.key === key) return;
    if (old?.live && flags.live && old.name === message.name) {  // only its text has grown
      old.body.replaceChildren(...words(message.text));
      this.shown[i] = { ...old, key };
      return;
    }
    const made = this.article(message, flags, editing);
    if (old) old.node.replaceWith(made.node);
    else this.messages.append(made.node);
    this.shown[i] = { ...made, key, live: flags.live, name: message.name };
  }

  article(message, { live, end, again }, editing) {
    const t = this.t, { role, name } = message;
    const body = h("div", { class: "glm3kit-body" });
    if (editing) body.append(this.editor(message));
    else if (message.arguments) body.append(h("pre", { class: "glm3kit-code" }, message.arguments));
    else body.append(...words(message.text));
    const tools = !live && !editing ? h("span", { class: "glm3kit-actions" },
      this.button("copy", t.copy, (event) => this.copied(event.currentTarget, message.text), { bare: true }),
      this.button("edit", t.edit, () => { this.editing = message.at; this.update(); }, { bare: true }),
      again ? this.button("regenerate", t.regenerate, () => this.ask("regenerate"), { bare: true }) : null) : null;
    const known = ["user", "assistant", "system", "observation"].includes(role);
    const article = h("article", { "aria-label": known ? t[role] : role,
      class: ["glm3kit-message", known ? `glm3kit-${role}` : "", name && "glm3kit-named", live && "glm3kit-live",
        message.left_out && "glm3kit-left-out"].filter(Boolean).join(" ") },
    h("div", { class: "glm3kit-who" }, known ? t[role] : role, name ? h("span", { class: "glm3kit-tag" }, name) : null,
    message.tools ? h("span", { class: "glm3kit-tag" }, fill(t.toolCount, { n: message.tools })) : null, tools), body);
    if (!end) return { node: article, body };
    return { node: h("div", null, article, h("div", { class: "glm3kit-gone" }, t.gone)), body };
  }

  async copied(button, text) {
    await copy(text);
    button.classList.add("glm3kit-done");
    this.status.textContent = this.t.copied;
    setTimeout(() => button.classList.remove("glm3kit-done"), 1200);
  }

  /** In place of a message: its text, to be said differently. */
  editor(message) {
    const t = this.t;
    const close = () => { this.editing = null; this.update(); };
    const save = () => {
      if (this.state.busy || !area.value.trim()) return;
      this.editing = null;
      if (message.role === "assistant") this.ask("rewrite", { at: message.at, text: area.value });
      else if (message.at === 0 && this.isOpening()) this.ask("set_system", { text: area.value });
      else this.ask("send", { text: area.value, role: message.role, at: message.at });
      this.update();
    };
    const rows = Math.min(12, message.text.split("\n").length + 1);
    const area = h("textarea", { "aria-label": t.editMessage, rows,
      onkeydown: (event) => (event.key === "Escape" ? close() : this.onKey(event, save)) });
    area.value = message.text;
    setTimeout(() => area.focus());
    const asks = SPEAKERS.includes(message.role) && !(message.at === 0 && this.isOpening());
    return h("div", { class: "glm3kit-editor" }, area, h("div", { class: "glm3kit-row" },
      this.button("", asks ? t.saveSend : t.save, save, { class: "glm3kit-primary" }),
      this.button("", t.cancel, close)));
  }

  /** Whether the first message is a system turn that nobody answered: it sets the scene. */
  isOpening() {
    const [first, second] = this.model.get("messages");
    return first?.role === "system" && second?.role !== "assistant";
  }

  /** Below the messages: an error, a call or code that waits for a person, or how to begin. */
  buildAfter(all) {
    const t = this.t, { error, call, code } = this.state, shown = [];
    if (!all.length && !error) shown.push(h("div", { class: "glm3kit-hint" }, t.hint));
    if (error) shown.push(h("div", { class: "glm3kit-card glm3kit-error", role: "alert" },
      h("div", { class: "glm3kit-who" }, t.error), h("div", { class: "glm3kit-words" }, error.reason),
      error.trace ? h("details", null, h("summary", null, t.trace), h("pre", null, error.trace)) : null));
    if (call) shown.push(h("div", { class: "glm3kit-card", role: "group", "aria-label": t.wants },
      h("div", null, `${t.wants} `, h("b", null, call.name)),
      call.arguments ? h("pre", { class: "glm3kit-code" }, call.arguments) : null,
      call.reason ? h("p", null, `${t.unreadable} ${call.reason}`) : null,
      call.runs ? h("div", { class: "glm3kit-row" },
        this.button("", t.run, () => this.ask("run_tool"), { class: "glm3kit-primary" }),
        this.button("", t.decline, () => this.ask("send", { text: t.declined, role: "observation" })))
        : h("p", null, t.byHand)));
    if (code !== null) shown.push(h("div", { class: "glm3kit-card", role: "group", "aria-label": t.code },
      h("div", null, t.code), h("div", { class: "glm3kit-row" },
        this.button("", t.insert, () => this.insert(code), { class: "glm3kit-primary" }),
        this.button("", t.observe, () => this.ask("observe_cell")))));
    return shown;
  }

  insert(code) {
    this.ask("watch_cells");
    this.status.textContent = insertCell(this.model, code) ? this.t.inserted : this.t.cannotInsert;
  }

  /** The next line of the guide example, after what was said of it. */
  buildChips(all) {
    const guide = this.model.get("guide"), said = all.filter(({ role }) => role !== "assistant");
    const told = (k) => guide.slice(0, k).every(({ role, text }, i) => {
      const message = said[said.length - k + i];
      return message?.role === role && message.text === text;
    });
    const next = [...guide.keys()].reverse().map((k) => k + 1).find(told) ?? 0;
    const key = JSON.stringify([next, this.state.busy, this.language]);
    if (this.chipsOf === key && this.chips.childElementCount) return;
    this.chipsOf = key;
    this.chips.replaceChildren();
    if (next >= guide.length || this.state.busy) return;
    const { role, text } = guide[next];
    this.chips.append(h("button", { type: "button", class: "glm3kit-chip", onclick: () => this.ask("send", guide[next]) },
      h("b", null, `${this.t.guide} ${next + 1}/${guide.length}`), ` ${this.t[role]}: ${text}`));
  }

  tokens(used, window) { return fill(window ? this.t.contextOf : this.t.contextOpen, { used, window }); }

  updateFooter() {
    const t = this.t, { used, window, busy, running, reply_tokens, speed, left_out } = this.state;
    const full = window ? Math.min(1, used / window) : 0;
    this.meter.hidden = !window || used === null;
    this.bar.style.width = `${100 * full}%`;
    this.meter.classList.toggle("glm3kit-full", full > 0.9);
    for (const [name, value] of [["now", used], ["max", window], ["text", this.tokens(used, window)]])
      this.meter.setAttribute(`aria-value${name}`, value ?? 0);
    const parts = [used === null ? "" : `${t.context} ${this.tokens(window ? Math.min(used, window) : used, window)}`,
      speed ? fill(t.speed, { n: reply_tokens, s: speed.toFixed(1) }) : "",
      left_out ? fill(t.leftOut, { n: left_out }) : ""];
    this.count.textContent = parts.filter(Boolean).join(" · ");
    const note = this.model.get("note");
    if (running) this.status.textContent = `${t.running} ${running}…`;
    else if (busy) this.status.textContent = t.generating;
    else if (note) this.status.textContent = note;
    else if (this.status.textContent.endsWith("…")) this.status.textContent = t.done;
    this.status.classList.toggle("glm3kit-warning", Boolean(note) && !busy);
  }

  /** Once for each: a message that was not answered is given back, a call that waits for a person awaits its result. */
  offer() {
    const { busy, call, unsent } = this.state;
    if (busy) return;
    const key = JSON.stringify([unsent, call]);
    if (key === this.offered) return;
    this.offered = key;
    if (unsent && !this.text.value) this.write(unsent.text, unsent.role);
    else if (call && !call.runs) this.write(this.draft.text, "observation");
  }

  onMessage(message) {
    if ("draft" in message) this.write(message.draft, message.role);
    else if (this.copying) {
      this.copying = false;
      copy(message.text).then(() => { this.status.textContent = this.t.copied; });
    } else if ("file" in message) download(message.file, message.text);
  }
}

function render({ model, el }) {
  const chat = new Chat(model, el);
  // messages, growing and state arrive together: drawn once, before the next frame
  let planned = 0;
  const plan = () => { planned ||= requestAnimationFrame(() => { planned = 0; chat.update(); }); };
  const names = ["messages", "growing", "state", "note"].map((name) => `change:${name}`);
  names.forEach((name) => model.on(name, plan));
  const receive = (message) => chat.onMessage(message);
  model.on("msg:custom", receive);
  return () => {
    cancelAnimationFrame(planned);
    names.forEach((name) => model.off(name, plan));
    model.off("msg:custom", receive);
  };
}

export default { render };
