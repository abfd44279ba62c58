// Draws the picture, with the patches that are kept as they are and all others faded.

/**
 * @param {HTMLCanvasElement} canvas - where.
 * @param {CanvasImageSource & {width: number, height: number}} picture - what.
 * @param {number[] | null} kept - indices of kept patches, row by row; null: no patches are shown.
 * @param {[number, number] | null} grid - rows and columns of patches; null: they cannot be shown.
 * @param {"inner" | "outer" | null} square - which square the model sees, within or around the picture; null: the picture as it is.
 */
export function draw(canvas, picture, kept, grid, square) {
  const scale = Math.min(1, 1024 / Math.max(picture.width, picture.height));
  canvas.width = Math.max(1, Math.round(picture.width * scale));
  canvas.height = Math.max(1, Math.round(picture.height * scale));
  const pen = canvas.getContext("2d");
  pen.drawImage(picture, 0, 0, canvas.width, canvas.height);
  canvas.dataset.kept = kept === null || grid === null ? "" : String(kept.length);
  if (kept === null || grid === null) return;
  const [rows, columns] = grid;
  const side = Math.min(canvas.width, canvas.height);
  const seen = square === "outer" ? Math.max(canvas.width, canvas.height) : side;
  const [width, height] = square === null ? [canvas.width, canvas.height] : [seen, seen];
  const [left, top] = [(canvas.width - width) / 2, (canvas.height - height) / 2];
  pen.fillStyle = "rgba(255, 255, 255, 0.75)";
  pen.fillRect(0, 0, canvas.width, canvas.height);
  const stays = new Set(kept);
  const x = (column) => Math.round(left + (width * column) / columns);
  const y = (row) => Math.round(top + (height * row) / rows);
  const back = 1 / scale;
  for (const patch of stays) {
    const [row, column] = [Math.floor(patch / columns), patch % columns];
    const [w, h] = [x(column + 1) - x(column), y(row + 1) - y(row)];
    pen.drawImage(picture, x(column) * back, y(row) * back, w * back, h * back, x(column), y(row), w, h);
  }
  pen.strokeStyle = "#ff8c00";
  pen.lineWidth = Math.max(1.5, side / 250);
  pen.beginPath();
  for (const patch of stays) {
    const [row, column] = [Math.floor(patch / columns), patch % columns];
    const edges = [
      [column === 0 || !stays.has(patch - 1), x(column), y(row), x(column), y(row + 1)],
      [column === columns - 1 || !stays.has(patch + 1), x(column + 1), y(row), x(column + 1), y(row + 1)],
      [!stays.has(patch - columns), x(column), y(row), x(column + 1), y(row)],
      [!stays.has(patch + columns), x(column), y(row + 1), x(column + 1), y(row + 1)],
    ];
    for (const [open, x0, y0, x1, y1] of edges) {
      if (!open) continue;
      pen.moveTo(x0, y0);
      pen.lineTo(x1, y1);
    }
  }
  pen.stroke();
}
