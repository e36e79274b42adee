// Browsers start no Worker for a page that was opened from a file. There, this script runs the search in a hidden frame
// instead. MkDocs Material looks for the name IFrameWorker; on a web server nothing changes.
if (location.protocol === "file:") {
  window.IFrameWorker = class extends EventTarget {
    constructor(url) {
      super();
      this.waiting = [];
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.body.append(this.frame);
      const scope = this.frame.contentWindow;
      const inside = this.frame.contentDocument;
      inside.open();
      inside.write("<!doctype html><body></body>");
      inside.close();
      scope.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      scope.importScripts = async (...urls) => {
        for (const one of urls) await load(inside, one);
      };
      load(inside, String(url)).then(() => {
        this.send = (data) => scope.dispatchEvent(new MessageEvent("message", { data }));
        this.waiting.splice(0).forEach(this.send);
      });
    }
    postMessage(data) {
      this.send ? this.send(data) : this.waiting.push(data);
    }
    terminate() {
      this.frame.remove();
    }
  };
  window.Worker = window.IFrameWorker;

  function load(inside, url) {
    return new Promise((resolve, reject) => {
      const script = inside.createElement("script");
      script.src = url;
      script.onload = resolve;
      script.onerror = () => reject(new Error(`${url} cannot be loaded`));
      inside.body.append(script);
    });
  }
}
