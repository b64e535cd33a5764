"use strict";
// Draws the charts of a page, again when light turns to dark or the page is printed: plotly knows no CSS variables.
(() => {
  const root = document.documentElement;
  const charts = Array.from(document.querySelectorAll(".chart"), (box) => ({
    box,
    figure: JSON.parse(box.nextElementSibling.textContent),
  }));

  const coloured = (value, style, isColour) => {
    if (typeof value === "string" && isColour && value.startsWith("var(")) {
      const colour = style.getPropertyValue(value.slice(4, -1)).trim();
      if (!colour) throw new Error("style.css has no colour " + value);
      return colour;
    }
    if (Array.isArray(value)) return value.map((item) => coloured(item, style, isColour));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(
      Object.entries(value).map(([key, item]) => [key, coloured(item, style, /color(scale|way)?$/.test(key))]),
    );
  };

  // A finger that moves over a chart scrolls the page.
  const still = (layout) => {
    const axes = new Set(["xaxis", "yaxis", ...Object.keys(layout).filter((key) => /^[xy]axis\d*$/.test(key))]);
    for (const axis of axes) layout[axis] = { ...layout[axis], fixedrange: true };
    return { ...layout, dragmode: false };
  };

  const draw = async () => {
    const style = getComputedStyle(root);
    const touch = matchMedia("(pointer: coarse)").matches;
    for (const { box, figure } of charts) {
      try {
        const layout = coloured(figure.layout, style, false);
        const config = { displayModeBar: false, responsive: true };
        await Plotly.react(box, coloured(figure.data, style, false), touch ? still(layout) : layout, config);
      } catch (error) {
        box.textContent = "This chart could not be drawn: " + error.message;
        console.error(error);
      }
    }
    root.dataset.charts = "drawn";
  };

  // What is inside closed details has no width yet.
  for (const details of document.querySelectorAll("details")) {
    details.addEventListener("toggle", () => {
      if (details.open) for (const box of details.querySelectorAll(".chart")) Plotly.Plots.resize(box);
    });
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  for (const [event, printing] of [["beforeprint", true], ["afterprint", false]]) {
    addEventListener(event, () => {
      root.classList.toggle("printing", printing);
      draw();
    });
  }
  draw();
})();
