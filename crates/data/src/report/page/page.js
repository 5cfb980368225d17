"use strict";
// What a page can do beyond being read: theme, copying, filters, and moving through tokens by keys.
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const root = document.documentElement;

  // Theme: the system's until the button is used.
  const theme = document.getElementById("theme");
  const dark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const label = () => { theme.textContent = dark() ? "Light" : "Dark"; };
  theme.hidden = false;
  theme.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; label(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", label);
  label();

  // Commands are copied whole.
  for (const command of all(".command")) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = "Copy";
    button.addEventListener("click", async () => {
      const code = command.querySelector("code");
      getSelection().selectAllChildren(code);
      try {
        await navigator.clipboard.writeText(code.textContent);
        button.textContent = "Copied";
      } catch {
        button.textContent = document.execCommand("copy") ? "Copied" : "Selected";
      }
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
    command.append(button);
  }

  // Printed, everything that can be opened is open.
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = all("details.more:not([open])");
    opened.forEach(one => { one.open = true; });
  });
  addEventListener("afterprint", () => opened.forEach(one => { one.open = false; }));

  // A link to a row opens it.
  const follow = () => {
    const target = document.getElementById(location.hash.slice(1));
    if (!target || !target.classList.contains("row")) return;
    if (target.hidden) reset();
    target.open = true;
    target.scrollIntoView();
  };
  addEventListener("hashchange", follow);
  addEventListener("click", event => {
    const link = event.target.closest && event.target.closest("a[href^='#row-']");
    if (link && link.hash === location.hash) follow();
  });

  // Filters.
  const rows = all("details.row");
  const form = document.querySelector(".filters");
  const selects = form ? all("select", form) : [];
  const shown = form && form.querySelector("output");
  const value = name => { const select = selects.find(one => one.name === name); return select ? select.value : ""; };
  const has = (row, name, wanted) => !wanted || row.dataset[name].split(" ").includes(wanted);
  const apply = () => {
    const [from, to] = value("tokens").split("-").map(Number);
    let n = 0;
    for (const row of rows) {
      const tokens = Number(row.dataset.tokens);
      const inside = !value("tokens") || (tokens >= from && tokens <= to);
      const fits = has(row, "codes", value("codes")) && has(row, "sections", value("sections")) && inside;
      row.hidden = !fits;
      n += fits;
    }
    shown.textContent = n === rows.length ? `${n} rows` : `${n} of ${rows.length} rows`;
  };
  const reset = () => { selects.forEach(select => { select.value = ""; }); apply(); };
  if (form) {
    form.hidden = false;
    form.addEventListener("change", apply);
    form.addEventListener("submit", event => event.preventDefault());
    for (const link of all("a[data-filter]")) {
      link.addEventListener("click", () => {
        reset();
        selects.find(select => select.name === "codes").value = link.dataset.filter;
        apply();
      });
    }
    apply();
  }

  // Tokens: what happens to the one under the pointer or the focus is said below its row.
  let current = null;
  const line = row => {
    let detail = row.querySelector(".detail");
    if (!detail) {
      detail = document.createElement("p");
      detail.className = "detail";
      detail.id = `detail-${row.id}`;
      row.append(detail);
    }
    return detail;
  };
  const describe = token => {
    const run = token.closest(".run");
    const row = token.closest(".row");
    let index = Number(run.dataset.at);
    for (const before of run.querySelectorAll("i, em")) {
      if (before === token) break;
      index += before.dataset.n ? Number(before.dataset.n) : before.dataset.id.split(" ").length;
    }
    const ids = token.dataset.id.split(" ");
    const loss = token.dataset.loss ? ` · loss ${token.dataset.loss.replaceAll(" ", ", ")} nats` : "";
    const place = ids.length > 1 ? `tokens ${index} to ${index + ids.length - 1}` : `token ${index}`;
    line(row).textContent = `${run.dataset.why} · ${place} of ${row.dataset.tokens} · id ${ids.join(", ")}${loss}`;
  };
  const focus = token => {
    if (!token) return;
    if (current) current.removeAttribute("tabindex");
    current = token;
    token.tabIndex = 0;
    describe(token);
    token.setAttribute("aria-describedby", `detail-${token.closest(".row").id}`);
    token.focus();
  };
  document.addEventListener("mouseover", event => {
    if (event.target.localName === "i" && event.target.closest(".tokens")) describe(event.target);
  });
  document.addEventListener("click", event => {
    if (event.target.localName === "i" && event.target.closest(".tokens")) focus(event.target);
  });
  document.addEventListener("focusin", event => {
    if (event.target.localName === "i" && event.target.closest(".tokens")) describe(event.target);
  });
  // A row that is opened has one token in the order of the Tab key: the first that is learned.
  const first = row => row.querySelector(".learned i") || row.querySelector(".tokens i");
  const ready = row => {
    const token = first(row);
    if (row.open && token && !row.querySelector("i[tabindex]")) token.tabIndex = 0;
  };
  rows.forEach(row => { ready(row); row.addEventListener("toggle", () => ready(row)); });

  const step = (list, at, by) => list[Math.min(Math.max(list.indexOf(at) + by, 0), list.length - 1)];
  document.addEventListener("keydown", event => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("select, input, button")) return;
    const token = event.target.closest(".tokens i");
    let row = event.target.closest(".row");
    const key = event.key;
    if (key === "[" || key === "]") {
      const visible = rows.filter(one => !one.hidden);
      const next = row ? step(visible, row, key === "]" ? 1 : -1) : visible[0];
      if (!next) return;
      next.open = true;
      next.scrollIntoView({ block: "start" });
      if (first(next)) focus(first(next));
      else next.querySelector("summary").focus();
    } else if (key === "j" || key === "k" || (token && (key === "ArrowDown" || key === "ArrowUp"))) {
      row = row || rows.find(one => one.open && !one.hidden);
      if (!row) return;
      const runs = all(".run", row).filter(run => run.querySelector("i"));
      if (!token || !row.contains(token)) { row.open = true; focus(first(row)); }
      else focus(step(runs, token.closest(".run"), key === "j" || key === "ArrowDown" ? 1 : -1).querySelector("i"));
    } else if (token && (key === "ArrowRight" || key === "ArrowLeft" || key === "Home" || key === "End")) {
      const tokens = all(".tokens i", row);
      focus(key === "Home" ? tokens[0] : key === "End" ? tokens[tokens.length - 1] : step(tokens, token, key === "ArrowRight" ? 1 : -1));
    } else if (token && key === "Escape") {
      row.querySelector("summary").focus();
    } else {
      return;
    }
    event.preventDefault();
  });
  follow();
})();
