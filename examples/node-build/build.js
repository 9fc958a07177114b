// Every src/*.md becomes a page in dist/.
const fs = require("node:fs");
const path = require("node:path");
const { marked } = require("marked");

fs.rmSync("dist", { recursive: true, force: true });
fs.mkdirSync("dist");
for (const name of fs.readdirSync("src").filter((name) => name.endsWith(".md"))) {
  const body = marked.parse(fs.readFileSync(path.join("src", name), "utf8"));
  const page = `<!doctype html>\n<meta charset="utf-8">\n<title>Field notes</title>\n${body}`;
  fs.writeFileSync(path.join("dist", name.replace(/\.md$/, ".html")), page);
  console.log(`built ${name}`);
}
