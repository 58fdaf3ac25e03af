// The panels of the chat cell: system turn, tools, sampling, file. Each gives its elements for the chat that opens it.

const OPTIONS = {  // of generation, each with the least step that a person would take
  do_sample: null, temperature: 0.1, top_k: 1, top_p: 0.05, repetition_penalty: 0.05, max_new_tokens: 1, max_length: 1,
  seed: 1,
};

const PANELS = {
  settings(chat) {
    const t = chat.t, area = h("textarea", { "aria-label": t.settings, rows: "3" });
    area.value = chat.state.system;
    const apply = chat.button("", t.apply, () => chat.ask("set_system", { text: area.value }),
      { "data-idle": true });
    return [h("p", null, t.systemHelp), area, h("div", { class: "glm3kit-row" }, apply)];
  },

  tools(chat) {
    const t = chat.t, { tools, ask_first } = chat.state;
    if (!tools.length) return [h("p", null, t.noTools)];
    const mode = h("select", { "aria-label": t.whenCalled,
      onchange: () => chat.ask("set_ask_first", { ask_first: mode.value === "ask" }) },
    h("option", { value: "auto" }, t.automatic), h("option", { value: "ask" }, t.askFirst));
    mode.value = ask_first ? "ask" : "auto";
    return [h("label", { class: "glm3kit-row" }, h("span", null, t.whenCalled), mode),
      ...tools.map((tool) => h("div", { class: "glm3kit-tool" },
        h("b", null, tool.name), h("span", null, tool.description),
        tool.runs ? null : h("i", null, t.described),
        tool.schema ? h("details", null, h("summary", null, t.schema), h("pre", { class: "glm3kit-code" }, tool.schema))
          : null))];
  },

  sampling(chat) {
    const t = chat.t, { sampling } = chat.state;
    if (!sampling) return [h("p", null, t.noSampling)];
    const known = Object.keys(OPTIONS).filter((name) => name in sampling);
    return [h("div", { class: "glm3kit-grid" }, ...known.map((name) => {
      const set = (value) => chat.ask("set_sampling", { [name]: value });
      const input = OPTIONS[name] === null
        ? h("input", { type: "checkbox", "data-idle": true, onchange: () => set(input.checked) })
        : h("input", { type: "number", step: OPTIONS[name], "data-idle": true, placeholder: t.noLimit,
          onchange: () => set(input.value === "" ? null : Number(input.value)) });
      if (OPTIONS[name] === null) input.checked = sampling[name];
      else input.value = sampling[name] ?? "";
      if (name === "seed") input.placeholder = "";
      return h("label", null, h("span", null, t[name]), input);
    }))];
  },

  file(chat) {
    const t = chat.t;
    const file = h("input", { type: "file", accept: ".json,.md,.txt", "aria-label": t.load, class: "glm3kit-hidden",
      onchange: async () => {
        if (file.files[0]) chat.ask("load", { text: await file.files[0].text() });
        file.value = "";
      } });
    return [h("div", { class: "glm3kit-row" },
      chat.button("copy", t.copyAll, () => { chat.copying = true; chat.ask("save", { form: "md" }); }),
      chat.button("", t.json, () => chat.ask("save", { form: "json" })),
      chat.button("", t.md, () => chat.ask("save", { form: "md" })),
      chat.button("", t.load, () => file.click(), { "data-idle": true }), file)];
  },
};
