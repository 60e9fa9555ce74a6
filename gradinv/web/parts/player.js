// The player of recorded runs. All frames are in the browser; nothing here asks the server for anything.
//
// Data: length of the header (4 bytes, little endian), header (JSON), then the pictures one after the other. A frame is
// the mosaic as recorded: one row of tiles for each seed, then the consensus; it is drawn tile by tile.

const SECONDS = 9; // a whole run

export default function (component) {
  const { data, parentElement } = component;
  const bytes = data instanceof Uint8Array ? data : new Uint8Array(data);
  const length = new DataView(bytes.buffer, bytes.byteOffset).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(bytes.subarray(4, 4 + length)));
  let offset = 4 + length;
  const blob = (size, type) => new Blob([bytes.subarray(offset, (offset += size))], { type });

  // Called again for other runs, and for the same ones when the theme changes: those go on as they are.
  const root = parentElement.querySelector(".player");
  if (root.shown === header.name) return root.leave;
  const first = root.shown === undefined;
  root.leave?.();
  root.shown = header.name;
  const find = name => root.querySelector(`.${name}`);
  const make = (tag, name = "", text = "") => {
    const element = document.createElement(tag);
    if (name) element.className = name;
    if (text) element.textContent = text;
    return element;
  };
  // A new run keeps what the visitor has chosen to see.
  const chosen = (root.chosen ??= { seeds: false, revealed: false });
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const addresses = [];
  const loaded = header.runs.map(run => ({
    frames: run.frames.map(([size, type]) => blob(size, type)),
    originals: run.originals.map(size => {
      addresses.push(URL.createObjectURL(blob(size, "image/png")));
      return addresses.at(-1);
    }),
  }));
  const total = Math.max(...header.runs.map(run => run.total));
  const steps = [...new Set(header.runs.flatMap(run => run.steps))].sort((a, b) => a - b);
  const levels = header.runs.flatMap(run => [run.baseline, ...run.psnr.flat()]).filter(Number.isFinite);
  // Runs that were measured alike share a scale.
  const distances = name => header.runs.filter(run => run.measured === name).flatMap(run => run.distance).filter(Number.isFinite);
  let place = 0, playing = false, timer = 0, gone = false;

  // --- curves: lines in a unit square, stretched to the chart's box; what is at the step stands in words above it

  const chart = (title, range, lines, dashed, meetings = []) => {
    const box = make("div", "chart"), words = make("p", "words"), plot = make("div", "plot"), area = make("div", "area"), mark = make("div", "mark");
    const [low, high] = range, space = "http://www.w3.org/2000/svg", svg = document.createElementNS(space, "svg");
    svg.setAttribute("viewBox", "0 0 1 1");
    svg.setAttribute("preserveAspectRatio", "none");
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", `${title} by step`);
    const draw = (points, name) => {
      const line = document.createElementNS(space, "polyline");
      const height = value => 1 - (value - low) / (high - low || 1);
      const known = points.filter(([, value]) => Number.isFinite(value));
      line.setAttribute("points", known.map(([x, y]) => `${x / total},${height(y)}`).join(" "));
      line.setAttribute("class", name);
      svg.append(line);
    };
    if (Number.isFinite(dashed)) draw([[0, dashed], [total, dashed]], "dashed");
    lines.forEach((points, index) => draw(points, index === lines.length - 1 ? "main" : "thin"));
    area.append(svg, mark);
    for (const step of meetings) {
      const line = make("div", "meeting");
      line.style.left = `${(100 * step) / total}%`;
      line.append(make("span", "", "the seeds meet"));
      area.append(line);
    }
    plot.append(area, make("span", "high", high.toPrecision(3)), make("span", "low", low.toPrecision(3)));
    box.append(words, plot);
    const seek = event => {
      if (event.type === "pointerdown") plot.setPointerCapture(event.pointerId);
      if (!plot.hasPointerCapture(event.pointerId)) return;
      const side = area.getBoundingClientRect();
      const wanted = (total * (event.clientX - side.left)) / side.width;
      pause();
      show(steps.reduce((best, step, index) => (Math.abs(step - wanted) < Math.abs(steps[best] - wanted) ? index : best), 0));
    };
    plot.addEventListener("pointerdown", seek);
    plot.addEventListener("pointermove", seek);
    return { box, tell: (step, text) => ((mark.style.left = `${(100 * step) / total}%`), words.replaceChildren(...text)) };
  };

  // --- one panel a run

  const panels = header.runs.map((run, index) => {
    const panel = make("section", "panel"), board = make("div"), charts = make("div", "charts");
    const body = make("div", run.batch > 5 ? "" : "few");
    body.append(board, charts);
    panel.append(make("h2", "", run.title), make("p", "story", run.story), body);
    const row = (name, note) => {
      const line = make("div", "row"), label = make("div", "label"), tiles = make("div", "tiles");
      label.append(make("b", "", name), make("span", "", note));
      tiles.style.setProperty("--n", Math.min(8, run.batch));
      tiles.style.setProperty("--few", Math.min(4, run.batch));
      line.append(label, tiles);
      board.append(line);
      return { line, tiles };
    };
    const rows = [...Array(run.seeds).keys()].map(seed => row(`Seed ${seed + 1}`, "").line);
    const last = row(...run.result).line;
    const canvases = [...rows, last].map((line, y) =>
      run.order.map((x, at) => {
        const figure = make("figure"), canvas = make("canvas"), caption = make("figcaption");
        canvas.width = canvas.height = run.side;
        canvas.setAttribute("role", "img");
        figure.append(canvas, caption);
        line.lastChild.append(figure);
        return { canvas, caption, x, y, at };
      }),
    );
    const kept = row("Originals", "what the client kept").tiles;
    const originals = loaded[index].originals.map((address, at) => {
      const figure = make("figure"), picture = make("img"), hidden = make("div", "hidden", "?");
      const caption = make("figcaption");
      picture.src = address;
      picture.alt = `Original: ${run.titles[at]}`;
      hidden.setAttribute("role", "img");
      hidden.setAttribute("aria-label", "Hidden original");
      figure.append(picture, hidden, caption);
      kept.append(figure);
      return { picture, hidden, caption };
    });
    const points = values => run.steps.map((step, at) => [step, values[at]]);
    const quality = chart("PSNR of the reconstruction", [Math.min(...levels), Math.max(...levels)], run.psnr.map(points), run.baseline, run.meetings);
    charts.append(quality.box);
    const distance = run.distance.some(Number.isFinite)
      ? chart(run.measured, [0, Math.max(...distances(run.measured))], [points(run.distance)])
      : null;
    if (distance) charts.append(distance.box);
    find("panels").append(panel);
    return { run, originals, rows, last, canvases, quality, distance, bitmaps: [], drawn: null };
  });

  // --- frames: decoded in order, drawn when they are there

  const decode = async (panel, frames) => {
    for (let index = 0; index < frames.length && !gone; index++) {
      panel.bitmaps[index] = await createImageBitmap(frames[index]);
      // The first ones at once; later ones only where they are waited for.
      if (index === at(panel)) draw(panel);
    }
  };
  const at = panel => Math.max(0, panel.run.steps.findLastIndex(step => step <= steps[place]));
  const draw = panel => {
    const bitmap = panel.bitmaps[at(panel)];
    if (!bitmap || panel.drawn === bitmap) return;
    panel.drawn = bitmap;
    const side = panel.run.side;
    for (const { canvas, x, y } of panel.canvases.flat()) {
      canvas.getContext("2d").drawImage(bitmap, x * side, y * side, side, side, 0, 0, side, side);
    }
  };

  const strong = text => make("b", "", text);
  const show = wanted => {
    place = Math.min(Math.max(0, wanted), steps.length - 1);
    const step = steps[place];
    slider.value = place;
    slider.setAttribute("aria-valuetext", `step ${step} of ${total}`);
    find("step").textContent = `Step ${step} of ${total}`;
    for (const panel of panels) {
      const now = at(panel), { run } = panel, own = run.steps[now];
      draw(panel);
      const level = run.psnr.at(-1)[now], gap = run.distance[now];
      panel.quality.tell(own, ["PSNR ", strong(Number.isFinite(level) ? `${level.toFixed(1)} dB` : "–"), ` · a constant colour ${run.baseline.toFixed(1)} dB`]);
      panel.distance?.tell(own, [`${panel.run.measured} `, strong(Number.isFinite(gap) ? gap.toFixed(3) : "–")]);
    }
  };

  // --- controls

  const slider = find("slider"), play = find("play"), toggle = find("seeds"), reveal = find("reveal");
  const keep = () => {
    const address = new URL(location.href);
    address.searchParams.set("step", steps[place]);
    history.replaceState(history.state, "", address);
  };
  const pause = () => {
    playing = false;
    cancelAnimationFrame(timer);
    play.textContent = "▶ Play";
  };
  const start = () => {
    if (place === steps.length - 1) show(0);
    playing = true;
    play.textContent = "❚❚ Pause";
    const began = performance.now(), from = place, pace = (SECONDS * 1000) / steps.length;
    const tick = now => {
      if (!playing) return;
      const due = from + Math.floor((now - began) / pace);
      if (due !== place) show(due);
      if (place < steps.length - 1) timer = requestAnimationFrame(tick);
      else pause();
    };
    timer = requestAnimationFrame(tick);
  };
  const move = by => (pause(), show(place + by), keep());
  const switchTo = () => {
    const { seeds, revealed } = chosen;
    const several = panels.some(({ run }) => run.seeds > 1);
    toggle.hidden = !several;
    toggle.textContent = seeds ? "Show the consensus" : "Show the seeds";
    reveal.textContent = revealed ? "Hide the originals" : "Reveal the originals";
    for (const { run, originals, rows, last, canvases } of panels) {
      const own = run.seeds > 1 && seeds;
      rows.forEach(line => (line.hidden = !own));
      last.hidden = own;
      originals.forEach(({ picture, hidden, caption }, index) => {
        picture.hidden = !revealed;
        hidden.hidden = revealed;
        caption.textContent = revealed ? run.classes[index] : `picture ${index + 1}`;
      });
      for (const { canvas, caption, y, at } of canvases.flat()) {
        const name = revealed ? run.restored[at] : `picture ${at + 1}`;
        canvas.setAttribute("aria-label", `Reconstruction of ${name}${y < run.seeds && run.seeds > 1 ? `, seed ${y + 1}` : ""}`);
        const right = run.restored[at] === run.classes[at];
        caption.textContent = revealed ? `${right ? "✓" : "✗"} ${name}` : "";
        caption.title = revealed ? `label restored ${right ? "correctly" : "wrongly"}` : "";
      }
    }
  };
  slider.max = steps.length - 1;
  slider.oninput = () => (pause(), show(Number(slider.value)));
  slider.onchange = keep;
  play.onclick = () => (playing ? (pause(), keep()) : start());
  toggle.onclick = () => ((chosen.seeds = !chosen.seeds), switchTo());
  reveal.onclick = () => ((chosen.revealed = !chosen.revealed), switchTo());
  const keys = event => {
    const target = event.composedPath()[0], own = parentElement.contains(target) || target === document.body;
    if (!own || event.ctrlKey || event.metaKey || event.altKey || gone) return;
    if (event.key === " " && target.tagName !== "BUTTON") play.click();
    else if (event.key === "ArrowLeft") move(-1);
    else if (event.key === "ArrowRight") move(1);
    else if (event.key === "r") reveal.click();
    else return;
    event.preventDefault();
  };
  document.addEventListener("keydown", keys);
  // Whoever chose a run with the mouse plays it with the keys next: they are to reach the player, not the choice.
  const released = event => {
    const chosen = event.detail && event.target.closest?.(".st-key-replay-run, .st-key-replay-pair");
    if (chosen) setTimeout(() => document.activeElement?.blur());
  };
  document.addEventListener("click", released, true);

  switchTo();
  const asked = first ? parseInt(new URL(location.href).searchParams.get("step")) : NaN;
  if (asked >= 0) show(steps.findLastIndex(step => step <= asked));
  else show(still ? steps.length - 1 : 0);
  panels.forEach((panel, index) => decode(panel, loaded[index].frames));
  if (!(asked >= 0) && !still) start();

  root.leave = () => {
    gone = true;
    pause();
    document.removeEventListener("keydown", keys);
    document.removeEventListener("click", released, true);
    find("panels").replaceChildren();
    addresses.forEach(address => URL.revokeObjectURL(address));
    panels.forEach(panel => panel.bitmaps.forEach(bitmap => bitmap.close()));
    root.shown = null;
  };
  return root.leave;
}
