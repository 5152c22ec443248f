"use strict";
// Draws the figures in the page's colours, and again when these change: light and dark, screen and paper.
(() => {
  const root = document.documentElement;
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const chosen = {};
  const PAPER_WIDTH = 640; // of A4 within its margins, and within a figure's
  const config = { displayModeBar: false, scrollZoom: false, doubleClick: false, showTips: false };

  // "var(--ink)" in a figure is the page's colour of that name.
  const filled = (value, css) => {
    if (typeof value === "string") {
      const name = /^var\((--[\w-]+)\)$/.exec(value);
      return name ? css.getPropertyValue(name[1]).trim() : value;
    }
    if (Array.isArray(value)) return value.map((item) => filled(item, css));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, filled(item, css)]));
  };

  const draw = () => {
    const css = getComputedStyle(root);
    const drawn = Object.entries(figures).map(([id, figure]) => {
      const place = document.getElementById(id);
      const { data, layout } = filled(figure, css);
      layout.width = root.classList.contains("printing") ? PAPER_WIDTH : place.clientWidth;
      if (layout.width < 480) {
        layout.font.size = 11;
        for (const axis of [layout.xaxis, layout.yaxis]) if (axis.title) axis.title.font = { size: 11 };
      }
      if (id in chosen) data.forEach((trace, k) => { trace.visible = k === chosen[id]; });
      return Plotly.react(place, data, layout, config);
    });
    return Promise.all(drawn).then(() => { root.dataset.drawn = String(Number(root.dataset.drawn || 0) + 1); });
  };

  for (const choices of document.querySelectorAll(".choices")) {
    choices.addEventListener("change", (event) => {
      chosen[choices.dataset.chart] = Number(event.target.value);
      draw();
    });
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  addEventListener("resize", draw);
  addEventListener("beforeprint", () => {
    root.classList.add("printing");
    for (const details of document.querySelectorAll("details")) details.open = true;
    draw();
  });
  addEventListener("afterprint", () => {
    root.classList.remove("printing");
    draw();
  });
  draw();
})();
