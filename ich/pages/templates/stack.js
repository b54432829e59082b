// Without scripts all slices stand below each other, and a slider that would not move is hidden.
for (const stack of document.querySelectorAll(".stack")) {
  const frames = [...stack.querySelectorAll(".frame")];
  const slider = stack.querySelector("input"), marks = [...stack.querySelectorAll("line.now")];
  const jumps = [...stack.querySelectorAll("rect.jump")];  // of each curve, one per frame
  const show = (number) => {
    const n = Math.max(0, Math.min(frames.length - 1, number));
    frames.forEach((frame, i) => { frame.hidden = i !== n; });
    slider.value = n;
    for (const mark of marks) for (const end of ["x1", "x2"]) mark.setAttribute(end, n + 0.5);
  };
  const move = (step) => show(Number(slider.value) + step);
  slider.addEventListener("input", () => show(Number(slider.value)));
  stack.querySelector(".frames").addEventListener("wheel", (event) => {
    event.preventDefault();  // the page would scroll along, which a passive listener cannot stop
    move(Math.sign(event.deltaY));
  }, { passive: false });
  stack.addEventListener("keydown", (event) => {
    const step = { ArrowUp: -1, ArrowDown: 1, PageUp: -5, PageDown: 5 }[event.key];
    if (step) { event.preventDefault(); move(step); }
  });
  jumps.forEach((jump, n) => jump.addEventListener("click", () => show(n % frames.length)));
  slider.hidden = false;
  show(Number(slider.value));
}
