"use strict";
const units = { k: 1e3, M: 1e6, B: 1e9, T: 1e12, kB: 1e3, MB: 1e6, GB: 1e9, TB: 1e12 };
const number = (text) => {
  const found = text.replaceAll(",", "").match(/^\s*([+-]?\d*\.?\d+(?:e[+-]?\d+)?)(?:\s*([kMBT]|[kMGT]B)\b)?/);
  return found ? found[1] * (units[found[2]] ?? 1) : NaN;
};
const sort = (heading) => {
  const table = heading.closest("table"), body = table.tBodies[0], column = heading.cellIndex;
  const keyed = [...body.rows].map((row) => [row, row.cells[column].textContent.trim()]);
  const numeric = keyed.every(([, text]) => !text || !isNaN(number(text)));
  const first = numeric ? "descending" : "ascending", other = numeric ? "ascending" : "descending";
  const order = heading.ariaSort === first ? other : first, sign = order === "ascending" ? 1 : -1;
  keyed.sort(([, a], [, b]) => (!a - !b) || sign * (numeric ? number(a) - number(b) : a.localeCompare(b, "en", { numeric: true })));
  for (const each of table.tHead.rows[0].cells) each.ariaSort = null;
  heading.ariaSort = order;
  body.append(...keyed.map(([row]) => row));
};
for (const heading of document.querySelectorAll("table.sortable th")) {
  const button = document.createElement("button");
  button.append(...heading.childNodes);
  button.addEventListener("click", () => sort(heading));
  heading.append(button);
}
for (const command of document.querySelectorAll(".command")) {
  const button = document.createElement("button"), text = command.firstChild;
  const words = text.textContent.split(" ").map((word) => {  // lines break between words only
    const span = document.createElement("span");
    span.textContent = word;
    return span;
  });
  text.replaceChildren(...words.flatMap((word, place) => (place ? [" ", word] : [word])));
  button.textContent = "Copy";
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text.textContent);
      button.textContent = "Copied";
    } catch {  // a browser that keeps the clipboard to itself: the text is selected at least
      getSelection().selectAllChildren(text);
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });
  command.append(button);
}
addEventListener("beforeprint", () => { for (const each of document.querySelectorAll("details")) each.open = true; });
