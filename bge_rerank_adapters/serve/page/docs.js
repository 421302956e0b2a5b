"use strict";
function made(tag, text, kind) {
  const element = document.createElement(tag);
  element.textContent = text ?? "";
  if (kind) element.className = kind;
  return element;
}

function resolved(schema, all) {
  return schema && schema.$ref ? all[schema.$ref.split("/").pop()] : schema;
}

function named(schema) {
  if (!schema) return "";
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.enum && schema.enum.includes(true)) return "boolean, or a word for it";
  if (schema.enum) return schema.enum.map((each) => JSON.stringify(each)).join(" | ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  const several = schema.anyOf || schema.oneOf;
  if (several) return [...new Set(several.map(named))].join(" | ");
  if (schema.type === "array") return "list of " + (named(schema.items) || "anything");
  return schema.type || "anything";
}

// A text whose parts between backquotes are code.
function written(tag, text, kind) {
  const element = made(tag, "", kind);
  (text ?? "").split("`").forEach((each, place) => element.append(place % 2 ? made("code", each) : each));
  return element;
}

function fields(schema) {
  const list = made("dl");
  for (const [name, field] of Object.entries(schema.properties || {})) {
    const term = made("dt");
    const needed = (schema.required || []).includes(name) ? ", needed" : "";
    term.append(made("code", name), made("span", " " + named(field) + needed, "quiet"));
    list.append(term, written("dd", field.description));
  }
  return list;
}

// The schemas of a body or an answer: of one that may have several shapes, each.
function shapes(content, all) {
  const schema = content && Object.values(content)[0] && Object.values(content)[0].schema;
  const each = schema ? schema.oneOf || schema.anyOf || [schema] : [];
  return each.map((one) => (one.type === "array" ? one.items : one))
    .map((one) => [named(one), resolved(one, all)])
    .filter(([, found]) => found && found.properties);
}

function part(title, content, all) {
  return shapes(content, all).map(([name, schema]) => {
    const details = made("details");
    details.append(made("summary", title + ": " + name), written("p", schema.description, "quiet"), fields(schema));
    return details;
  });
}

function endpoint(path, verb, about, all) {
  const section = made("section", "", "card");
  const line = made("div");
  line.append(made("span", verb.toUpperCase(), "verb"), made("code", path));
  section.append(line, made("p", about.summary + (about.security ? ". Needs the API key." : ".")));
  section.append(...part("Request", about.requestBody && about.requestBody.content, all));
  const refusals = made("dl");
  for (const [status, response] of Object.entries(about.responses)) {
    if (status.startsWith("2")) {
      section.append(...part("Answer", response.content, all));
    } else {
      refusals.append(made("dt", status), made("dd", response.description));
    }
  }
  if (refusals.children.length) {
    const details = made("details");
    details.append(made("summary", "Refusals"), refusals);
    section.append(details);
  }
  return section;
}

async function show() {
  const place = document.getElementById("endpoints");
  try {
    const described = await (await fetch(new URL("openapi.json", document.baseURI))).json();
    const all = described.components.schemas;
    document.getElementById("title").textContent = described.info.title + " " + described.info.version;
    place.replaceChildren(made("p", described.info.description));
    for (const [path, verbs] of Object.entries(described.paths)) {
      for (const [verb, about] of Object.entries(verbs)) place.append(endpoint(path, verb, about, all));
    }
  } catch (error) {
    place.replaceChildren(made("p", "The description could not be read: " + error.message, "bad"));
  }
}
show();
