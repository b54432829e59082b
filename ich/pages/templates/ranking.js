for (const table of document.querySelectorAll("table.ranking")) {
  const heads = [...table.querySelectorAll("thead th")];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") === (column ? "descending" : "ascending");
    const falling = column ? !up : up;
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", falling ? "descending" : "ascending");
    const key = (body) => body.rows[0].cells[column].dataset.value ?? "";
    const bodies = [...table.tBodies].filter((body) => !body.classList.contains("last"));
    bodies.sort((a, b) => {
      const x = key(a), y = key(b);
      if (x === "" || y === "") return (x === "") - (y === "");
      const order = column ? x - y : x.localeCompare(y);
      return falling ? -order : order;
    });
    const last = [...table.tBodies].filter((body) => body.classList.contains("last"));
    table.append(...bodies, ...last);
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
