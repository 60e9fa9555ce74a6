// Lets the first page's strip move: its frames take turns in the picture that Markdown has drawn already.
//
// Data: `frames` (addresses of pictures, noise first), `steps` (the step of each), `total`, `seconds` for the whole way.

const PAUSE = 2500; // milliseconds at the end

export default function (component) {
  const { data, parentElement } = component;
  const root = parentElement.querySelector(".strip");
  const strip = () => document.querySelector(".st-key-moving img");
  if (root.leave && root.shown === data.frames.length) return root.leave;
  root.shown = data.frames.length;
  const slider = root.querySelector(".slider"), play = root.querySelector(".play"), told = root.querySelector(".step");
  const last = data.frames.length - 1;
  let place = last, timer = 0;
  const show = wanted => {
    place = wanted;
    const picture = strip();
    if (picture) picture.src = data.frames[place];
    slider.value = place;
    told.textContent = `Step ${data.steps[place]} of ${data.total}`;
    slider.setAttribute("aria-valuetext", told.textContent);
  };
  const pause = () => {
    clearTimeout(timer);
    timer = 0;
    play.textContent = "▶";
    play.setAttribute("aria-label", "Play");
  };
  const next = () => {
    show(place === last ? 0 : place + 1);
    timer = setTimeout(next, place === last ? PAUSE : (1000 * data.seconds) / data.frames.length);
  };
  const start = () => {
    play.textContent = "❚❚";
    play.setAttribute("aria-label", "Pause");
    next();
  };
  slider.max = last;
  slider.oninput = () => (pause(), show(Number(slider.value)));
  play.onclick = () => (timer ? pause() : start());
  pause();
  show(last);
  if (!matchMedia("(prefers-reduced-motion: reduce)").matches) start();
  root.leave = () => (pause(), (root.leave = null));
  return root.leave;
}
