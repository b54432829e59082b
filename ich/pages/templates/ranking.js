// Without scripts a ranking stays as it was written: by AUC, with all parts open.
for (const table of document.querySelectorAll("table.ranking")) {
  const heads = [...table.querySelectorAll("thead th")];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    // A first click gives numbers from the highest on, and names from A; a second turns it round.
    const first = column ? "descending" : "ascending";
    const second = column ? "ascending" : "descending";
    const order = head.getAttribute("aria-sort") === first ? second : first;
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", order);
    const key = (body) => body.rows[0].cells[column].dataset.value ?? "";
    const isLast = (body) => body.classList.contains("last");
    const bodies = [...table.tBodies];
    const sorted = bodies.filter((body) => !isLast(body)).sort((a, b) => {
      const x = key(a), y = key(b);
      if (x === "" || y === "") return (x === "") - (y === "");  // no value: below, either way
      const rising = column ? x - y : x.localeCompare(y);
      return order === "descending" ? -rising : rising;
    });
    table.append(...sorted, ...bodies.filter(isLast));
  }));
  for (const button of table.querySelectorAll("button.opens")) {
    const parts = [...button.closest("tbody").querySelectorAll("tr.part")];
    const show = (open) => {
      button.setAttribute("aria-expanded", open);
      parts.forEach((part) => { part.hidden = !open; });
    };
    button.addEventListener("click", () => show(button.getAttribute("aria-expanded") !== "true"));
    show(false);
  }
}
