"use strict";
// Draws the figures of the page; the runs that are ticked in the legend are shown in all of them.
// Only these buttons: one of plotly.js's own would send the chart to a server.
const buttons = [["zoom2d", "pan2d", "autoScale2d", "resetScale2d", "toImage"]];
const options = { responsive: true, displaylogo: false, plotlyServerURL: "", modeBarButtons: buttons };
const figures = JSON.parse(document.getElementById("figures").textContent);
const charts = Object.keys(figures).map((id) => document.getElementById(id));
const ticks = [...document.querySelectorAll("#legend input")];

function show() {
  const shown = new Set(ticks.filter((tick) => tick.checked).map((tick) => Number(tick.dataset.run)));
  for (const chart of charts) {
    const visible = chart.data.map((trace) => !trace.meta || shown.has(trace.meta.run));
    Plotly.restyle(chart, { visible });
  }
}

function fit(width) {
  for (const chart of charts) Plotly.relayout(chart, width ? { width, autosize: false } : { width: null, autosize: true });
}

const drawn = charts.map((chart) => Plotly.newPlot(chart, figures[chart.id].data, figures[chart.id].layout, options));
for (const tick of ticks) tick.addEventListener("change", show);
for (const button of document.querySelectorAll("#legend button")) {
  button.addEventListener("click", () => {
    for (const tick of ticks) tick.checked = button.dataset.all === "true";
    show();
  });
}
window.addEventListener("beforeprint", () => fit(900)); // narrower than any paper that lies on its side
window.addEventListener("afterprint", () => fit(null));
Promise.all(drawn).then(() => document.documentElement.setAttribute("data-drawn", String(drawn.length)));
