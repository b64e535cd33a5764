"use strict";
// Draws the charts of a page once the rest of it is shown, and again when light turns to dark or the page is printed:
// plotly knows no CSS variables.
(() => {
  const root = document.documentElement;
  const charts = Array.from(document.querySelectorAll(".chart"), (box) => ({
    box,
    figure: JSON.parse(box.nextElementSibling.textContent),
    legend: box.previousElementSibling,
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

  const draw = async ({ box, figure }) => {
    const style = getComputedStyle(root);
    const touch = matchMedia("(pointer: coarse)").matches;
    const config = { displayModeBar: false, responsive: true };
    try {
      const layout = { ...coloured(figure.layout, style, false), showlegend: false };
      await Plotly.react(box, coloured(figure.data, style, false), touch ? still(layout) : layout, config);
    } catch (error) {
      box.textContent = "This chart could not be drawn: " + error.message;
      console.error(error);
    }
  };

  // Plotly's own legend takes half of a chart on a phone. A click on a name hides its trace, or shows it again.
  const addLegend = (chart) => {
    const { figure, legend } = chart;
    const named = figure.data.filter((trace) => trace.name && trace.showlegend !== false);
    if (figure.layout.showlegend === false || (named.length < 2 && !figure.layout.showlegend)) return;
    for (const trace of named) {
      const { colorway } = figure.layout.template.layout;
      const colour = trace.marker?.color ?? trace.line?.color ?? colorway[figure.data.indexOf(trace) % colorway.length];
      const button = document.createElement("button");
      const mark = document.createElement("span");
      mark.className = /lines/.test(trace.mode) ? "line " + (trace.line?.dash ?? "") : trace.type === "scatter" ? "point" : "";
      mark.style.color = colour;
      button.append(mark, plain(trace.name));
      button.type = "button";
      button.setAttribute("aria-pressed", "true");
      button.addEventListener("click", () => {
        trace.visible = trace.visible === "legendonly" ? true : "legendonly";
        button.setAttribute("aria-pressed", String(trace.visible === true));
        draw(chart);
      });
      legend.append(button);
    }
  };
  const plain = (text) => text.replaceAll("&lt;", "<").replaceAll("&gt;", ">").replaceAll("&amp;", "&");

  // Plotly's megabytes stand in the page as text, so that nobody waits for them. The page's policy knows their hash.
  const loadPlotly = () => {
    const script = document.createElement("script");
    script.textContent = document.getElementById("plotly").textContent;
    document.head.append(script);
  };
  const drawAll = () => {
    if (!window.Plotly) return null; // not loaded yet: they are drawn when it is
    return Promise.all(charts.map(draw)).then(() => (root.dataset.charts = "drawn"));
  };

  // What is inside closed details has no width yet.
  for (const details of document.querySelectorAll("details")) {
    details.addEventListener("toggle", () => {
      if (details.open && window.Plotly) for (const box of details.querySelectorAll(".chart")) Plotly.Plots.resize(box);
    });
  }
  addEventListener("themechange", drawAll);
  for (const [event, printing] of [["beforeprint", true], ["afterprint", false]]) {
    addEventListener(event, () => {
      root.classList.toggle("printing", printing);
      drawAll();
    });
  }
  charts.forEach(addLegend);
  const begin = () =>
    setTimeout(() => {
      loadPlotly();
      drawAll();
    }, 50);
  if (document.readyState === "complete") begin();
  else addEventListener("load", begin);
})();
