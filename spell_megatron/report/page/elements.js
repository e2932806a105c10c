// Elements of the page, and the data that is embedded in it. Text of a model becomes text nodes only, never markup.

const $ = (id) => document.getElementById(id);

/** An element. Attributes that begin with "on" are listeners; children are nodes or texts; null ones are left out. */
function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "colour") element.style.background = `var(--${value})`;
    else if (name === "width") element.style.width = value;
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

const swatch = (colour) => h("span", { class: "swatch", colour });

async function unpack(id) {
  const letters = atob($(id).textContent);
  $(id).remove();
  const bytes = new Uint8Array(letters.length);
  for (let i = 0; i < letters.length; i++) bytes[i] = letters.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

const data = await unpack("data");
const { runs } = data;
const several = runs.length > 1;
const RUN_COLOURS = ["blue", "orange", "green", "purple", "red", "teal", "pink", "brown"];
const runColour = (index) => RUN_COLOURS[index % RUN_COLOURS.length];
const state = { window: 1, axis: "steps", hidden: new Set() };
const redraws = []; // to be called when runs, axis, averaging or theme change
