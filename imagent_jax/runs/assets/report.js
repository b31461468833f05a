"use strict";
// A cursor over all charts at once: the values of the step under the pointer stand in the legends.
const charts = [...document.querySelectorAll(".chart")].map((node) => ({
  svg: node.querySelector("svg"), cursor: node.querySelector(".cursor"), values: [...node.querySelectorAll("figcaption span b")], ...JSON.parse(node.dataset.chart),
}));
for (const chart of charts) chart.last = chart.values.map((b) => b.textContent);

function nearest(points, x) {
  return points.reduce((best, point) => (Math.abs(point[0] - x) < Math.abs(best[0] - x) ? point : best));
}

document.addEventListener("mousemove", (event) => {
  const over = charts.find((chart) => chart.svg === event.target.closest?.("svg"));
  for (const chart of charts) {
    chart.cursor.style.visibility = over ? "visible" : "hidden";
    if (!over) {
      chart.values.forEach((b, i) => (b.textContent = chart.last[i]));
      continue;
    }
    const frame = over.svg.getBoundingClientRect(), at = ((event.clientX - frame.left) / frame.width) * over.svg.viewBox.baseVal.width;
    const share = Math.min(1, Math.max(0, (at - over.left) / (over.right - over.left))), x = over.x[0] + share * (over.x[1] - over.x[0]);
    const here = chart.left + ((x - chart.x[0]) / (chart.x[1] - chart.x[0])) * (chart.right - chart.left);
    chart.cursor.setAttribute("x1", here);
    chart.cursor.setAttribute("x2", here);
    chart.values.forEach((b, i) => (b.textContent = Number(nearest(chart.lines[i], x)[1].toPrecision(3))));
  }
});
