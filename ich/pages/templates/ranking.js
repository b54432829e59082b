// Without scripts a ranking stays as it was written: by AUC, with all parts open.
for (const figure of document.querySelectorAll(".ranked")) {
  const table = figure.querySelector("table"), tools = figure.querySelector(".tools");
  // The plot's own heading sorts nothing, and has no button.
  const heads = [...table.tHead.rows[0].cells];
  const columns = heads.filter((head) => head.querySelector("button"));
  const rows = [...table.tBodies];
  for (const head of columns) head.querySelector("button").addEventListener("click", () => {
    // A first click gives numbers from the highest on, and names from A; a second turns it round.
    const column = heads.indexOf(head);
    const first = column ? "descending" : "ascending";
    const second = column ? "ascending" : "descending";
    const order = head.getAttribute("aria-sort") === first ? second : first;
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", order);
    const key = (body) => body.rows[0].cells[column].dataset.value ?? "";
    const isLast = (body) => body.classList.contains("last");
    const sorted = rows.filter((body) => !isLast(body)).sort((a, b) => {
      const x = key(a), y = key(b);
      if (x === "" || y === "") return (x === "") - (y === "");  // no value: below, either way
      const rising = column ? x - y : x.localeCompare(y);
      return order === "descending" ? -rising : rising;
    });
    table.append(...sorted, ...rows.filter(isLast));
  });
  for (const button of table.querySelectorAll("button.opens")) {
    const parts = [...button.closest("tbody").querySelectorAll("tr.part")];
    const show = (open) => {
      button.setAttribute("aria-expanded", open);
      parts.forEach((part) => { part.hidden = !open; });
    };
    button.addEventListener("click", () => show(button.getAttribute("aria-expanded") !== "true"));
    show(false);
  }
  const isNarrow = matchMedia("(max-width: 40rem)").matches;
  tools.querySelectorAll("input[type=checkbox]").forEach((box, number) => {
    if (isNarrow && number) box.checked = false;
    const column = heads.indexOf(columns[number + 1]);
    const show = () => {
      for (const row of table.rows) row.cells[column].classList.toggle("off", !box.checked);
    };
    box.addEventListener("change", show);
    show();  // a browser that goes back to a page keeps what was ticked
  });
  const search = tools.querySelector("input[type=search]");
  search?.addEventListener("input", () => {
    const wanted = search.value.toLowerCase();
    for (const body of rows) {
      body.hidden = !body.rows[0].cells[0].dataset.value.toLowerCase().includes(wanted);
    }
  });
  tools.hidden = !tools.children.length;
}
