"use strict";
const at = (id) => document.getElementById(id);
const address = (path) => new URL(path, document.baseURI).href;
let needsKey = false;

function made(tag, text, kind) {
  const element = document.createElement(tag);
  element.textContent = text;
  if (kind) element.className = kind;
  return element;
}

function said(text, bad) {
  at("said").textContent = text;
  at("said").className = bad ? "bad" : "quiet";
}

// A list of strings or objects, or else one document per line.
function documents() {
  const given = at("documents").value.trim();
  if (given.startsWith("[")) {
    try {
      const list = JSON.parse(given);
      if (Array.isArray(list)) return list;
    } catch (error) { /* lines that begin with a bracket */ }
  }
  return given.split("\n").map((line) => line.trim()).filter(Boolean);
}

function asked() {
  const body = { query: at("query").value, documents: documents() };
  if (at("top").value) body.top_n = Number(at("top").value);
  if (at("least").value) body.score_threshold = Number(at("least").value);
  return body;
}

function headers() {
  const key = at("key").value.trim();
  return key ? { Authorization: "Bearer " + key } : {};
}

async function answer(path, options) {
  const response = await fetch(address(path), { ...options, headers: headers() });
  if (response.status === 401) {
    needsKey = true;
    at("key-part").hidden = false;
    show();
    throw new Error(at("key").value ? "This is not the server's API key." : "Enter the server's API key first.");
  }
  const body = await response.json();
  if (!response.ok) throw new Error(body.message || "The server answered " + response.status + ".");
  return body;
}

async function introduce() {
  try {
    const info = await answer("info");
    at("model").textContent = info.model_id;
    document.title = info.model_id + " – reranker";
    const long = info.long_documents === "window" ? "longer texts in windows" : "longer texts are cut";
    at("limits").textContent = [
      info.model_dtype, info.max_input_length + " tokens a pair, " + long,
      "at most " + info.max_client_batch_size + " documents of " + info.max_characters + " characters",
      "version " + info.version,
    ].join(" · ");
  } catch (error) {
    at("limits").textContent = error.message;
  }
}

// Positions of the answer count characters, those of JavaScript halves of some of them.
function marked(text, span) {
  const paragraph = made("p", "", "text");
  const all = Array.from(text);
  if (!span || (span[0] === 0 && span[1] >= all.length)) {
    paragraph.textContent = text;
    return paragraph;
  }
  paragraph.append(
    all.slice(0, span[0]).join(""),
    made("mark", all.slice(...span).join("")),
    all.slice(span[1]).join(""),
  );
  return paragraph;
}

function bar(score) {
  const space = "http://www.w3.org/2000/svg";
  const drawing = document.createElementNS(space, "svg");
  const filled = document.createElementNS(space, "rect");
  drawing.setAttribute("viewBox", "0 0 1 1");
  drawing.setAttribute("preserveAspectRatio", "none");
  drawing.setAttribute("aria-hidden", "true");
  filled.setAttribute("width", String(score));
  filled.setAttribute("height", "1");
  drawing.append(filled);
  const frame = made("div", "", "bar");
  frame.append(drawing);
  return frame;
}

function moved(places) {
  if (places === 0) return "stayed";
  return (places > 0 ? "▲ up " : "▼ down ") + Math.abs(places);
}

function card(result, rank, given) {
  const item = made("li", "", "card");
  const line = made("div", "", "row ends");
  line.append(
    made("span", "#" + (rank + 1), "rank"),
    made("span", result.relevance_score.toFixed(4) + " (logit " + result.logit.toFixed(3) + ")"),
    made("span", "was " + (result.index + 1) + ", " + moved(result.index - rank), "quiet"),
  );
  const text = typeof given === "string" ? given : String(given.text);
  item.append(line, bar(result.relevance_score), marked(text, result.span));
  if (result.truncated) {
    item.append(made("p", "Its end was cut off: the text is longer than the model reads.", "quiet bad"));
  }
  if (item.querySelector("mark")) {
    item.append(made("p", "Marked: the part that scored best, characters " + result.span.join(" to "), "quiet"));
  }
  return item;
}

async function rank(event) {
  event.preventDefault();
  const body = asked();
  at("go").disabled = true;
  said("Ranking …");
  const begin = performance.now();
  try {
    const found = await answer("v2/rerank", {
      method: "POST", body: JSON.stringify({ ...body, return_details: true }),
    });
    at("cards").replaceChildren(
      ...found.results.map((each, place) => card(each, place, body.documents[each.index])),
    );
    at("ranked").hidden = false;
    const took = Math.round(performance.now() - begin);
    said(found.results.length + " of " + body.documents.length + " documents, "
      + found.usage.total_tokens + " tokens, " + took + " ms");
  } catch (error) {
    said(error.message, true);
  } finally {
    at("go").disabled = false;
  }
}

function pythonic(value) {
  if (value === null) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (Array.isArray(value)) return "[" + value.map(pythonic).join(", ") + "]";
  if (typeof value !== "object") return JSON.stringify(value);
  const pairs = Object.entries(value).map(([name, each]) => JSON.stringify(name) + ": " + pythonic(each));
  return "{" + pairs.join(", ") + "}";
}

function show() {
  const body = asked();
  const quoted = "'" + JSON.stringify(body).replaceAll("'", "'\\''") + "'";
  const shellKey = needsKey ? ' \\\n  -H "Authorization: Bearer $BGE_RERANK_API_KEY"' : "";
  at("curl").textContent = "curl " + address("v2/rerank") + shellKey
    + ' \\\n  -H "Content-Type: application/json" \\\n  -d ' + quoted;
  const pythonKey = needsKey ? '\n    headers={"Authorization": "Bearer " + os.environ["BGE_RERANK_API_KEY"]},' : "";
  at("python").textContent = (needsKey ? "import os\n\n" : "") + "import httpx\n\nanswer = httpx.post(\n    "
    + JSON.stringify(address("v2/rerank")) + "," + pythonKey + "\n    json=" + pythonic(body)
    + ',\n)\nfor each in answer.raise_for_status().json()["results"]:\n'
    + '    print(each["index"], each["relevance_score"])';
}

async function copy(event) {
  const button = event.currentTarget;
  const text = at(button.dataset.copies);
  try {
    await navigator.clipboard.writeText(text.textContent);
    button.textContent = "Copied";
  } catch (error) {
    // Without TLS a browser gives no clipboard: select it, so that a key press copies it.
    getSelection().selectAllChildren(text);
    button.textContent = "Selected";
  }
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
}

at("form").addEventListener("submit", rank);
at("form").addEventListener("input", show);
at("form").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("form").requestSubmit();
});
at("key").addEventListener("change", introduce);
for (const button of document.querySelectorAll("[data-copies]")) button.addEventListener("click", copy);
introduce();
show();
