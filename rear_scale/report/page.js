"use strict";
(() => {
  const names = (value) => {
    const size = Math.abs(value);
    if (value !== 0 && (size < 1e-3 || size >= 1e15)) return value.toExponential(3);
    return value.toLocaleString("en-US", { maximumSignificantDigits: Number.isInteger(value) ? 15 : 5 });
  };
  const page = document.getElementById("marks");
  const marks = page ? JSON.parse(page.dataset.marks) : [];
  const nearest = (values, wanted) => {
    let low = 0, high = values.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (values[middle] < wanted) low = middle; else high = middle;
    }
    return Math.abs(values[low] - wanted) <= Math.abs(values[high] - wanted) ? low : high;
  };
  for (const figure of document.querySelectorAll("figure.chart")) {
    const svg = figure.querySelector("svg");
    const shown = figure.querySelector(".values");
    const cursor = svg.querySelector(".cursor");
    const usual = shown.textContent;
    let data = null;
    const show = (event) => {
      data = data || JSON.parse(svg.dataset.chart);
      const box = svg.getBoundingClientRect();
      const view = svg.viewBox.baseVal;
      const [left, right] = [Number(svg.dataset.left), Number(svg.dataset.right)];
      const share = ((event.clientX - box.left) / box.width * view.width - left) / (right - left);
      const [first, last] = data.range;
      const wanted = first + Math.min(1, Math.max(0, share)) * (last - first);
      let at = null;
      const parts = [];
      for (const line of data.lines) {
        const place = nearest(line.x, wanted);
        if (at === null || Math.abs(line.x[place] - wanted) < Math.abs(at - wanted)) at = line.x[place];
      }
      for (const line of data.lines) {
        const place = nearest(line.x, at);
        let text = names(line.y[place]);
        if (line.low && line.low[place] !== line.high[place]) {
          text += ` (${names(line.low[place])} … ${names(line.high[place])})`;
        }
        parts.push(data.lines.length > 1 ? `${line.label} ${text}` : text);
      }
      const x = left + (at - first) / (last - first) * (right - left);
      cursor.setAttribute("x1", x);
      cursor.setAttribute("x2", x);
      cursor.style.visibility = "visible";
      let text = `${data.axis} ${names(at)}: ${parts.join(", ")}${data.unit ? ` ${data.unit}` : ""}`;
      if (data.axis === "step") {
        const close = marks.filter((mark) => Math.abs(mark[0] - wanted) <= (last - first) * 0.012);
        if (close.length) text += ` — ${close.slice(0, 3).map((mark) => mark[1]).join("; ")}`;
      }
      shown.textContent = text;
    };
    const hide = () => {
      cursor.style.visibility = "hidden";
      shown.textContent = usual;
    };
    svg.addEventListener("pointermove", show);
    svg.addEventListener("pointerdown", show);
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("pointercancel", hide);
  }
})();
