const fs = require("node:fs");
const http = require("node:http");
const path = require("node:path");

const pages = new Map(
  fs.readdirSync("dist").map((name) => [`/${name}`, fs.readFileSync(path.join("dist", name))]),
);

http
  .createServer((request, response) => {
    const wanted = new URL(request.url, "http://localhost").pathname;
    const page = pages.get(wanted === "/" ? "/index.html" : wanted);
    response.writeHead(page ? 200 : 404, { "content-type": "text/html; charset=utf-8" });
    response.end(page ?? "There is no such note.\n");
  })
  .listen(process.env.PORT, process.env.HOST);
