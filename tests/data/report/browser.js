// A small stand-in for a browser. It runs the script of a report, uses its controls, and prints what
// the page then shows: node browser.js report.html '[["click", "run"], ["set", "step", "500"]]'
"use strict";
const fs = require("fs");
const vm = require("vm");

class Element {
  constructor(tag) {
    Object.assign(this, { tag, children: [], listeners: {}, style: {}, attributes: {}, hidden: false });
    this.parent = null;
    this.own = "";
  }
  append(...added) {
    for (const child of added) {
      if (child instanceof Element) {
        child.remove();
        child.parent = this;
      }
      this.children.push(child);
    }
    const chosen = this.children.find((child) => child.selected);
    if (this.tag === "select" && chosen) this.value = chosen.value;
  }
  remove() {
    if (this.parent) this.parent.children = this.parent.children.filter((child) => child !== this);
    this.parent = null;
  }
  setAttribute(name, value) { this.attributes[name] = String(value); }
  addEventListener(kind, listener) { (this.listeners[kind] ||= []).push(listener); }
  send(kind) {
    if (!(kind in this.listeners)) throw new Error(`nothing listens to ${kind} of ${this.textContent}`);
    for (const listener of this.listeners[kind]) listener({ target: this });
  }
  set textContent(text) {
    this.children = [];
    this.own = text;
  }
  get textContent() {
    return this.own + this.children.map((child) => child.textContent ?? child).join(" ");
  }
  get shown() { return !this.hidden && (this.parent === null ? this.tag === "body" : this.parent.shown); }
  // The DOM has strings here.
  set value(value) { this.held = String(value); }
  get value() { return this.held; }
  *all() {
    yield this;
    for (const child of this.children) if (child instanceof Element) yield* child.all();
  }
}

const [, , path, actions] = process.argv;
const page = fs.readFileSync(path, "utf8");
const content = page.match(/<script type="application\/json" id="content">(.*?)<\/script>/s)[1];
const scripts = [...page.matchAll(/<script>(.*?)<\/script>/gs)];
const body = new Element("body");
for (const tag of page.slice(page.indexOf("<body>")).match(/<(header|nav|main)>/g)) {
  body.append(new Element(tag.slice(1, -1)));
}
const drawn = new Map();
const browser = {
  document: {
    createElement: (tag) => new Element(tag),
    getElementById: (id) => (id === "content" ? { textContent: content } : null),
    querySelector: (tag) => [...body.all()].find((node) => node.tag === tag) ?? null,
  },
  matchMedia: () => ({ matches: false }),
  Option: class extends Element {
    constructor(text, value, _, selected) {
      super("option");
      Object.assign(this, { own: text, value, selected });
    }
  },
  // All charts are in view.
  IntersectionObserver: class {
    constructor(callback) { this.callback = callback; }
    observe(target) { this.callback([{ target, isIntersecting: true }]); }
  },
  Plotly: { react: (node, traces, layout) => drawn.set(node, { traces, layout }) },
};
vm.runInNewContext(scripts.at(-1)[1], browser);

for (const [kind, name, value] of JSON.parse(actions)) {
  const named = [...body.all()].filter((node) =>
    kind === "click"
      ? node.tag === "button" && node.textContent.trim() === name
      : node.attributes["aria-label"] === name || (node.tag === "select" && node.parent.textContent.startsWith(name)),
  );
  if (named.length !== 1) throw new Error(`${named.length} controls are called ${name}`);
  if (kind === "set") named[0].value = value;
  named[0].send(kind === "click" ? "click" : named[0].tag === "select" ? "change" : "input");
}

const caption = (node) => node.parent.children.find((child) => child.tag === "figcaption")?.textContent ?? "";
const card = (node) => {
  for (; node; node = node.parent) if (node.className === "card run") return node.children[0].textContent.trim();
  return "";
};
const visible = [...body.all()].filter((node) => node.shown);
const table = visible.filter((node) => node.tag === "tr").map((row) => row.children.map((cell) => cell.textContent.trim()));
console.log(JSON.stringify({
  sections: visible.filter((node) => node.tag === "section").map((node) => ({
    title: [...node.all()].find((each) => each.tag === "h2").textContent,
    text: node.textContent,
  })),
  table,
  images: visible.filter((node) => node.tag === "img").map((node) => node.src),
  charts: [...drawn].filter(([node]) => node.shown).map(([node, chart]) => ({ caption: caption(node), card: card(node), ...chart })),
}));
