// The annotator's half of the app. It shows one item after another without waiting for the server, and keeps every vote
// in the browser's storage until the server says that it is on the disk.

const AHEAD = 4; // items whose pictures are fetched and decoded before their turn
const KEPT = 8; // items whose pictures stay decoded
const PATIENCE_MS = 3000; // for an answer, before the votes are sent again
const DOUBLE_CLICK_MS = 350;
const MAX_ZOOM = 16;

const clients = new WeakMap(); // one per place in the page: Streamlit calls again with new data

export default function ({ parentElement, data, setStateValue }) {
  if (!clients.has(parentElement)) clients.set(parentElement, new Client(parentElement));
  const client = clients.get(parentElement);
  client.update(data, (queue) => setStateValue("queue", queue));
  return () => {
    client.close();
    clients.delete(parentElement);
  };
}

class Client {
  constructor(root) {
    this.root = root;
    this.pictures = new Map(); // item id → its <img> elements
    this.pending = new Map(); // record id → { record, item, order }: not on the server's disk yet
    this.waiting = []; // items after the current one
    this.history = []; // what can be undone, the latest last
    this.current = null;
    this.zoom = { scale: 1, x: 0, y: 0 };
    this.order = 0; // of the latest record
    this.sentUpTo = 0;
    this.sending = null; // the queue that the server has yet to answer
    this.unsavedSince = null;
    this.clicked = 0;
    this.closing = new AbortController();
    const on = (target, event, handler, options) =>
      target.addEventListener(event, handler, { signal: this.closing.signal, ...options });
    on(window, "keydown", (event) => this.keydown(event));
    on(window, "keyup", (event) => keyOf(event) === "f" && this.flicker(false));
    on(window, "blur", () => this.flicker(false));
    on(this.find(".panes"), "wheel", (event) => this.wheel(event), { passive: false });
    this.timer = setInterval(() => this.tick(), PATIENCE_MS / 2);
  }

  close() {
    this.closing.abort();
    clearInterval(this.timer);
  }

  find(selector) {
    return this.root.querySelector(selector);
  }

  // what the server says

  update(data, transport) {
    const changed = this.data?.context !== data.context;
    this.data = data;
    this.transport = transport;
    if (data.answered === this.sending?.id) this.sending = null;
    if (changed) {
      this.pending = stored(data.folder);
      this.current = null;
      this.history = data.history.map((item) => ({ item, presentation_id: item.presentation_id }));
      for (const { record, item } of this.unsaved()) {
        if (record.choice !== "retract") this.history.push({ item, presentation_id: record.presentation_id });
        else this.history = this.history.filter((each) => each.presentation_id !== record.presentation_id);
      }
      this.decisions();
      if (this.pending.size) this.send();
      this.find(".annotator").focus({ preventScroll: true }); // away from the setting that was changed
    }
    for (const id of data.acknowledged) this.forget(id);
    const judged = this.judgedHere();
    const here = this.current && idOf(this.current);
    this.waiting = data.items.filter((item) => !judged.has(idOf(item)) && idOf(item) !== here);
    if (this.current) this.prefetch();
    else this.next();
    if ([...this.pending.values()].some(({ order }) => order > this.sentUpTo)) this.send();
    this.facts();
  }

  // One queue at a time is on its way: the next one would stop the server's answer to it, and a quick hand would get none.
  send() {
    if (this.sending && performance.now() - this.sending.at < PATIENCE_MS) return;
    this.sending = { id: uuid(), at: performance.now() };
    this.sentUpTo = this.order;
    const votes = [...this.pending.values()].map(({ record }) => record);
    this.transport({ sent: this.sending.id, clock: new Date().toISOString(), votes });
  }

  unsaved() {
    return [...this.pending.values()].filter(({ record }) => record.annotator === this.data.annotator);
  }

  judgedHere() {
    const ids = new Set();
    for (const { record, item } of this.unsaved())
      if (record.choice === "retract") ids.delete(idOf(item));
      else ids.add(idOf(item));
    return ids;
  }

  // votes

  judge(choice, place, input) {
    const item = this.current;
    if (!item || this.flickering) return;
    if (!this.images(item).some((image) => image.broken)) {
      const { since } = this.presentation; // when all of them were on the screen
      if (since === null) return this.refuse("Loading: the pictures are not all there yet.");
      if (performance.now() - since < this.data.floor_ms) return this.refuse("That was too fast to have been seen.");
    } else if (!["skip", "flag"].includes(choice))
      return this.say("A picture cannot be read, so there is nothing to choose: skip it (Space) or report it (X).");
    const n = item.shown.length;
    let [best, worst] = [null, null];
    if (choice === "best") {
      if (place >= n) return;
      if (n > 2 && this.best === null) return this.mark(place);
      if (n > 2 && this.best === place) return this.mark(null);
      [best, worst] = n > 2 ? [this.best, place] : [place, 1 - place];
    }
    this.history.push({ item, presentation_id: this.presentation.id });
    this.keep(item, { choice, best, worst, input });
    this.next();
    this.send();
    this.facts();
    const then = this.current?.shown.length > 2 ? " Press the best, 1 to 4." : "";
    this.say((choice === "best" ? `${this.placeName(best, n)} chosen.` : `${SAID[choice]}.`) + then);
  }

  undo(input) {
    if (this.best !== null && this.current) return this.mark(null);
    const last = this.history.pop();
    if (!last) return this.say("There is nothing to undo.");
    const { item, presentation_id } = last;
    this.keep(item, { choice: "retract", best: null, worst: null, input, presentation_id });
    if (this.current) this.waiting.unshift(this.current);
    this.current = item;
    this.show();
    this.send();
    this.facts();
    this.say("Undone: judge it again.");
  }

  keep(item, details) {
    const now = performance.now();
    const { id, at, since } = this.presentation ?? { id: "", at: null, since: null };
    const record = {
      id: uuid(),
      annotator: this.data.annotator,
      session_id: this.data.session,
      item: item.key,
      shown: item.shown,
      repeat: item.repeat,
      presentation_id: id,
      presented_at: at ?? new Date().toISOString(),
      decided_at: new Date().toISOString(),
      duration_ms: Math.round(now - (since ?? now)),
      zoomed: this.zoomed,
      ...details,
    };
    this.order = Math.max(this.order + 1, Date.now() * 1000); // several in one millisecond keep their order
    const entry = { record, item, order: this.order };
    this.pending.set(record.id, entry);
    try {
      localStorage.setItem(storageKey(this.data.folder, record.id), JSON.stringify(entry));
    } catch {
      // storage full or forbidden: the vote still travels, it only would not survive a reload
    }
  }

  forget(id) {
    this.pending.delete(id);
    try {
      localStorage.removeItem(storageKey(this.data.folder, id));
    } catch {
      // forbidden: nothing was kept there
    }
  }

  tick() {
    if (this.pending.size) this.send();
    this.facts();
  }

  // the picture side

  next() {
    this.current = this.waiting.shift() ?? null;
    this.show();
  }

  show() {
    const item = this.current;
    this.find(".annotator").classList.toggle("empty", !item);
    this.find(".prompt").textContent = item ? item.prompt : "";
    this.presentation = { id: uuid(), at: null, since: null };
    this.find(".annotator").classList.remove("seen");
    this.zoomed = false;
    this.best = null;
    this.say("");
    this.panes(item ? item.shown.length : 0);
    if (!item) return;
    this.place(this.images(item));
    this.find(".prompt").scrollTop = 0;
    this.fit();
    this.mark(null);
    this.broken();
    this.await(this.presentation);
    this.suggest();
    this.prefetch();
  }

  // From when on the pictures are seen: all of them are decoded, and a frame has been drawn with them.
  async await(presentation) {
    const decoded = await Promise.all(this.images(this.current).map((image) => image.decode())).catch(() => null);
    if (decoded) await new Promise(requestAnimationFrame);
    if (!decoded || presentation !== this.presentation || presentation.since !== null) return;
    presentation.at = new Date().toISOString();
    presentation.since = performance.now();
    this.find(".annotator").classList.add("seen");
  }

  refuse(words) {
    this.say(words);
    this.find(".panes").animate({ opacity: [1, 0.4, 1] }, 200);
  }

  panes(n) {
    const panes = this.find(".panes");
    if (panes.children.length === n) return;
    panes.replaceChildren(
      ...Array.from({ length: n }, (_, place) => {
        const pane = element("button", "pane", { type: "button" });
        pane.append(element("span", "picture"), element("kbd", "badge", { textContent: `${place + 1}` }));
        pane.append(element("span", "trouble", { textContent: "This picture cannot be read.", hidden: true }));
        pane.setAttribute("aria-label", this.paneLabel(place, n));
        this.listenTo(pane, place);
        return pane;
      }),
    );
    panes.style.setProperty("--n", n);
  }

  paneLabel(place, n) {
    return n === 2 ? `${place ? "Right" : "Left"} picture: choose it` : `Picture ${place + 1}: choose it`;
  }

  placeName(place, n) {
    return n === 2 ? (place ? "Right" : "Left") : `Picture ${place + 1}`;
  }

  place(images) {
    [...this.find(".panes").children].forEach((pane, place) => pane.firstChild.replaceChildren(images[place]));
  }

  images(item) {
    const id = idOf(item);
    const images =
      this.pictures.get(id) ??
      item.shown.map((token) => {
        const image = element("img", "", { alt: "", draggable: false });
        image.onerror = () => this.failed(image);
        image.onload = () => {
          if (item !== this.current) return;
          this.fit();
          this.await(this.presentation);
        };
        image.src = `/pair-image/${token}`;
        return image;
      });
    this.pictures.delete(id); // and to the end, as the latest in use
    this.pictures.set(id, images);
    return images;
  }

  prefetch() {
    for (const item of this.waiting.slice(0, AHEAD)) this.images(item).forEach((image) => image.decode().catch(() => {}));
    const needed = new Set([this.current, ...this.waiting.slice(0, AHEAD)].map((item) => item && idOf(item)));
    for (const id of [...this.pictures.keys()].slice(0, -KEPT)) if (!needed.has(id)) this.pictures.delete(id);
  }

  async failed(image) {
    const answer = await fetch(image.src, { method: "HEAD" }).catch(() => null);
    if (answer === null || answer.ok) {
      setTimeout(() => (image.src = image.src), PATIENCE_MS); // the server was away
      return;
    }
    image.broken = true;
    this.broken();
  }

  broken() {
    if (!this.current) return;
    const images = this.images(this.current);
    [...this.find(".panes").children].forEach((pane, place) => {
      pane.classList.toggle("broken", Boolean(images[place].broken));
      pane.querySelector(".trouble").hidden = !images[place].broken;
    });
  }

  async suggest() {
    const item = this.current;
    const images = this.images(item);
    await Promise.all(images.map((image) => image.decode())).catch(() => {});
    if (item !== this.current || images.some((image) => image.broken || !image.naturalWidth)) return;
    requestIdleCallback(() => {
      if (item !== this.current || this.best !== null) return;
      const samples = images.map(sample);
      const blank = samples.findIndex((pixels) => Math.max(...pixels) - Math.min(...pixels) < 8);
      if (blank >= 0) this.say(`${this.placeName(blank, images.length)} is nearly blank. Skip (Space)?`);
      else if (images.length === 2 && alike(...samples)) this.say("These two look nearly the same. Tie (0)?");
    });
  }

  mark(place) {
    this.best = place;
    const n = this.current.shown.length;
    [...this.find(".panes").children].forEach((pane, k) => pane.classList.toggle("best", k === place));
    if (n > 2) this.say(place === null ? "Press the best, 1 to 4." : `${place + 1} is the best. Now press the worst.`);
  }

  // zoom, pan, flicker

  listenTo(pane, place) {
    let grip = null;
    let dragged = false;
    pane.addEventListener("pointerdown", (event) => {
      dragged = false;
      if (event.button === 0 && this.zoom.scale > 1) {
        grip = { x: event.clientX, y: event.clientY, from: { ...this.zoom } };
        pane.setPointerCapture(event.pointerId);
      }
    });
    pane.addEventListener("mousedown", (event) => event.preventDefault()); // focus stays: Space goes on skipping
    pane.addEventListener("pointermove", (event) => {
      if (!grip) return;
      const [dx, dy] = [event.clientX - grip.x, event.clientY - grip.y];
      dragged ||= Math.hypot(dx, dy) > 4;
      if (dragged) this.setZoom(grip.from.scale, grip.from.x + dx / pane.clientWidth, grip.from.y + dy / pane.clientHeight);
    });
    for (const end of ["pointerup", "pointercancel"]) pane.addEventListener(end, () => (grip = null));
    pane.addEventListener("click", (event) => {
      const twice = event.detail > 1 || (event.detail && performance.now() - this.clicked < DOUBLE_CLICK_MS);
      const ofDrag = dragged && event.detail > 0; // a key has no drag before it, whatever the mouse did last
      if (ofDrag || twice) return;
      this.clicked = event.detail ? performance.now() : this.clicked;
      this.judge("best", place, inputOf(event));
    });
  }

  wheel(event) {
    const pane = event.target.closest(".pane");
    if (!pane) return;
    event.preventDefault();
    const box = pane.getBoundingClientRect();
    const at = [(event.clientX - box.x) / box.width - 0.5, (event.clientY - box.y) / box.height - 0.5];
    this.zoomBy(Math.exp(-event.deltaY / 400), at);
  }

  zoomBy(factor, [x, y] = [0, 0]) {
    const scale = Math.min(Math.max(this.zoom.scale * factor, 1), MAX_ZOOM);
    const ratio = scale / this.zoom.scale; // what is at (x, y) stays there
    this.setZoom(scale, x - (x - this.zoom.x) * ratio, y - (y - this.zoom.y) * ratio);
  }

  setZoom(scale, x, y) {
    const room = (scale - 1) / 2;
    const within = (value) => Math.min(Math.max(value, -room), room);
    this.zoom = { scale, x: within(x), y: within(y) };
    if (scale > 1) this.zoomed = true;
    this.fit(false);
  }

  fit(reset = true) {
    if (reset) this.zoom = { scale: 1, x: 0, y: 0 };
    const { scale, x, y } = this.zoom;
    const panes = this.find(".panes");
    panes.style.setProperty("--zoom", `translate(${100 * x}%, ${100 * y}%) scale(${scale})`);
    panes.classList.toggle("zoomed", scale > 1);
    panes.classList.toggle("pixels", this.fitted() * scale >= 2); // large pixels are shown as what they are
    this.find(".over").hidden = scale === 1;
    this.find(".over").textContent = `${Math.round(100 * scale)} %`;
  }

  fitted() {
    const [pane] = this.find(".panes").children;
    const [image] = this.current ? this.images(this.current) : [];
    if (!pane || !image?.naturalWidth) return 1;
    return Math.min(pane.clientWidth / image.naturalWidth, pane.clientHeight / image.naturalHeight);
  }

  originalPixels() {
    const scale = this.zoom.scale > 1 ? 1 : Math.min(1 / (this.fitted() * devicePixelRatio), MAX_ZOOM);
    if (scale < 1) this.say("The pictures are shown larger than their own pixels already.");
    else this.setZoom(scale, 0, 0);
  }

  flicker(on) {
    if (Boolean(this.flickering) === on || !this.current || this.current.shown.length !== 2) return;
    this.flickering = on;
    const images = this.images(this.current);
    this.place(on ? [...images].reverse() : images);
    this.find(".panes").classList.toggle("flickering", on);
  }

  // keys and buttons

  keydown(event) {
    const [target] = event.composedPath();
    const within = (selector) => target instanceof Element && target.closest(selector);
    if (event.ctrlKey || event.metaKey || event.altKey || event.getModifierState("AltGraph")) return;
    if (event.isComposing || event.defaultPrevented) return;
    if (within("input, textarea, select, [contenteditable=true], [role=listbox], [role=menu], [role=dialog]")) return;
    if ([" ", "Enter"].includes(event.key) && within("button, summary, [role=button]")) return;
    if (["ArrowUp", "ArrowDown"].includes(event.key) && within(".prompt")) return;
    const act = this.actions()[keyOf(event)];
    if (!act) return;
    event.preventDefault();
    if (!event.repeat || ZOOM_KEYS.includes(event.key)) act("key");
  }

  actions() {
    const best = (place) => (input) => this.judge("best", place, input);
    const choice = (name) => (input) => this.judge(name, null, input);
    const two = this.current?.shown.length === 2;
    return {
      ...{ 1: best(0), 2: best(1), 3: best(2), 4: best(3) },
      ...(two ? { ArrowLeft: best(0), ArrowRight: best(1), ArrowDown: choice("tie") } : {}),
      0: choice("tie"),
      9: choice("both_bad"),
      " ": choice("skip"),
      x: choice("flag"),
      Backspace: (input) => this.undo(input),
      "+": () => this.zoomBy(1.25),
      "=": () => this.zoomBy(1.25),
      "-": () => this.zoomBy(0.8),
      z: () => this.originalPixels(),
      f: () => this.flicker(true),
      Escape: () => this.fit(),
    };
  }

  decisions() {
    const four = this.data.mode === "best_worst";
    const button = (key, label, shown = key, title = "") => {
      const made = element("button", key === "Backspace" ? "undo" : "", { type: "button", title });
      made.append(element("kbd", "", { textContent: shown }), label);
      made.addEventListener("mousedown", (event) => event.preventDefault());
      if (key === "f") {
        for (const [name, on] of [["pointerdown", true], ["pointerup", false], ["pointerleave", false]])
          made.addEventListener(name, () => this.flicker(on));
        made.setAttribute("aria-label", `${label}, while F is held`);
      } else made.addEventListener("click", (event) => event.detail < 2 && this.actions()[key]?.(inputOf(event)));
      return made;
    };
    const group = (...buttons) => {
      const made = element("div", "group");
      made.append(...buttons);
      return made;
    };
    const bad = four ? "All bad" : "Both bad";
    this.find("footer").replaceChildren(
      four
        ? group(button("0", "All alike"))
        : group(button("1", "Left", "1 ←"), button("0", "Tie", "0 ↓"), button("2", "Right", "2 →")),
      group(
        button("9", bad),
        button(" ", "Skip", "Space"),
        button("x", "Unfit", "X", "Report as unfit for training"),
        button("Backspace", "Undo", "⌫"),
      ),
      group(
        ...(four ? [] : [button("f", "Flicker", "F")]),
        button("z", "Pixels", "Z"),
        button("-", "Out", "−"),
        button("+", "In", "+"),
      ),
    );
  }

  // words

  facts() {
    let here = 0;
    for (const { record } of this.unsaved()) here += record.choice === "retract" ? -1 : 1;
    const judged = this.data.judged + here;
    const left = Math.max(this.data.left - here, 0);
    this.find(".count").textContent = `${judged} of ${judged + left}`;
    const progress = this.find("progress");
    progress.value = judged / Math.max(judged + left, 1);
    const { pace } = this.data;
    this.find(".pace").textContent = pace && left ? `${Math.round(pace)} a minute · ${duration(left / pace)} left` : "";
    this.unsavedSince = this.pending.size ? (this.unsavedSince ?? performance.now()) : null;
    const late = this.pending.size && performance.now() - this.unsavedSince > PATIENCE_MS;
    const unsaved = late ? `${this.pending.size} not saved yet: is the server running?` : "";
    const problem = this.data.problem || unsaved;
    this.find(".saved").textContent = problem || (this.pending.size ? "Saving" : judged ? "Saved" : "");
    this.find(".saved").title = problem;
    this.find(".annotator").classList.toggle("unsaved", Boolean(problem));
    if (!this.current) this.say(left ? "Loading" : this.data.finished);
  }

  say(words) {
    this.find(".hint").textContent = words;
  }
}

const SAID = { tie: "Tie", both_bad: "Both bad", skip: "Skipped", flag: "Reported as unfit: it is not trained on" };
const ZOOM_KEYS = ["+", "=", "-"];

// What a key stands for: the letter or sign that it writes; by its place on the keyboard where the layout has no Latin
// letters, and in the row of the digits, which some layouts give only with shift.
function keyOf({ key, code, shiftKey }) {
  if (key.length > 1) return key; // named: Enter, or Process where an input method takes it
  const [, place, label] = /^(Key|Digit|Numpad)([A-Z0-9])$/.exec(code) ?? [];
  const foreign = !/[\0-\x7f]|\p{Script=Latin}/u.test(key);
  return (foreign || (place === "Digit" && !shiftKey) ? (label ?? key) : key).toLowerCase();
}

function idOf(item) {
  return `${item.key}${item.repeat ? " again" : ""}`;
}

function storageKey(folder, id) {
  return `dpo_sd.vote.${folder}.${id}`;
}

function stored(folder) {
  // of all windows: what another one sends too is the same vote, and counts once
  let keys = [];
  try {
    keys = Object.keys(localStorage).filter((key) => key.startsWith(storageKey(folder, "")));
  } catch {
    // forbidden: votes only live as long as the page
  }
  const entries = keys.map(storedEntry).filter(Boolean);
  return new Map(entries.sort((a, b) => a.order - b.order).map((entry) => [entry.record.id, entry]));
}

function storedEntry(key) {
  try {
    const entry = JSON.parse(localStorage.getItem(key)); // null where another window has just removed it
    return entry?.record?.id && entry.item?.key ? entry : null;
  } catch {
    return null;
  }
}

function uuid() {
  // crypto.randomUUID is there on 127.0.0.1 and https only
  const random = () => crypto.getRandomValues(new Uint8Array(1))[0];
  return "10000000-1000-4000-8000-100000000000".replace(/[018]/g, (c) => (c ^ (random() & (15 >> (c / 4)))).toString(16));
}

function element(name, className, properties = {}) {
  return Object.assign(document.createElement(name), { className, ...properties });
}

function inputOf(event) {
  if (!event.detail) return "key"; // a button pressed with Enter
  return event.pointerType === "touch" ? "touch" : "mouse";
}

function duration(minutes) {
  if (minutes < 1) return "under a minute";
  return minutes < 90 ? `${Math.round(minutes)} min` : `${Math.floor(minutes / 60)} h ${Math.round(minutes % 60)} min`;
}

function sample(image) {
  const canvas = Object.assign(document.createElement("canvas"), { width: 64, height: 64 });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingEnabled = false; // averages would make noise look blank
  context.drawImage(image, 0, 0, 64, 64);
  return context.getImageData(0, 0, 64, 64).data.filter((_, k) => k % 4 < 3);
}

function alike(a, b) {
  const differences = a.map((value, k) => Math.abs(value - b[k]));
  return Math.max(...differences) < 24 && differences.reduce((sum, value) => sum + value, 0) / a.length < 1;
}
