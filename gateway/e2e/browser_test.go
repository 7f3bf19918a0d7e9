package e2e_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"

	"holdfast/internal/mqtt"
	"holdfast/internal/testkit"
)

// browser is a headless Chromium that notes what its console says.
type browser struct {
	context.Context
	t  *testing.T
	mu sync.Mutex
	// said are errors of the console, and requests that failed
	said []string
}

func startBrowser(t *testing.T, patience time.Duration) *browser {
	t.Helper()
	path, err := exec.LookPath("chromium")
	if err != nil {
		t.Skip("no chromium: apt-get install chromium")
	}
	opts := append(chromedp.DefaultExecAllocatorOptions[:], chromedp.ExecPath(path), chromedp.NoSandbox, chromedp.Flag("disable-dev-shm-usage", true))
	alloc, stop := chromedp.NewExecAllocator(t.Context(), opts...)
	ctx, cancel := chromedp.NewContext(alloc)
	limited, end := context.WithTimeout(ctx, patience)
	t.Cleanup(func() { end(); cancel(); stop() })
	b := &browser{Context: limited, t: t}
	chromedp.ListenTarget(limited, func(ev any) {
		b.mu.Lock()
		defer b.mu.Unlock()
		switch e := ev.(type) {
		case *log.EventEntryAdded:
			if e.Entry.Level == log.LevelError {
				b.said = append(b.said, e.Entry.Text+" "+e.Entry.URL)
			}
		case *runtime.EventExceptionThrown:
			b.said = append(b.said, e.ExceptionDetails.Error())
		}
	})
	return b
}

func (b *browser) run(actions ...chromedp.Action) {
	b.t.Helper()
	if err := chromedp.Run(b, actions...); err != nil {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.t.Fatalf("browser: %v; its console: %v", err, b.said)
	}
}

// await waits until a script gives true.
func (b *browser) await(what, script string) {
	b.t.Helper()
	testkit.EventuallyNil(b.t, 20*time.Second, what, func() error {
		var yes bool
		if err := chromedp.Run(b, chromedp.Evaluate(script, &yes)); err != nil {
			return err
		}
		if !yes {
			var text string
			_ = chromedp.Run(b, chromedp.Text("main", &text))
			return fmt.Errorf("the page shows: %.600s", text)
		}
		return nil
	})
}

// shot keeps what the page looks like.
func (b *browser) shot(dir, name string) {
	b.t.Helper()
	var png []byte
	b.run(chromedp.FullScreenshot(&png, 100))
	if err := os.WriteFile(filepath.Join(dir, name+".png"), png, 0o644); err != nil {
		b.t.Fatal(err)
	}
}

// checks are what a page has to be for those who see little, or use no mouse.
const checks = `(() => {
	const bad = [];
	for (const e of document.querySelectorAll('input:not([type=hidden]),select,button'))
		if (!(e.labels && e.labels.length) && !e.textContent.trim() && !e.ariaLabel) bad.push('no label: ' + e.outerHTML);
	if (!document.documentElement.lang) bad.push('no language');
	if (document.querySelectorAll('h1').length !== 1) bad.push('not one h1');
	if (document.documentElement.scrollWidth > innerWidth) bad.push('wider than the window: ' + document.documentElement.scrollWidth);
	const lum = (c) => { const v = c.match(/[\d.]+/g).map(Number).slice(0, 3).map((x) => { x /= 255; return x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4; }); return 0.2126 * v[0] + 0.7152 * v[1] + 0.0722 * v[2]; };
	const ground = (e) => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor; if (c !== 'rgba(0, 0, 0, 0)') return c; } return 'rgb(255,255,255)'; };
	for (const e of document.querySelectorAll('h1,h2,p,td,th,dt,dd,a,button,label,span')) {
		if (!e.textContent.trim() || !e.offsetParent || e.closest('.chart')) continue;
		const a = lum(getComputedStyle(e).color), b = lum(ground(e)), ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
		if (ratio < 4.5) bad.push('contrast ' + ratio.toFixed(2) + ': ' + e.outerHTML.slice(0, 80));
	}
	return bad;
})()`

func (b *browser) check(page string) {
	b.t.Helper()
	var bad []string
	b.run(chromedp.Evaluate(checks, &bad))
	for _, f := range bad {
		b.t.Errorf("%s: %s", page, f)
	}
}

// TestDashboard looks at the pages with a browser: it signs in, sees counters move, sends a command and sees it succeed, and sees the
// gateway go and come back.
func TestDashboard(t *testing.T) {
	b := startBrowser(t, 90*time.Second)
	g := startGated(t, testkit.GatewayConfig{})
	secret := g.register("pump-7", nil).Secret
	addr := "http://" + g.HTTP
	token, err := g.Token()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	c, err := mqtt.Dial(ctx, mqtt.ClientOptions{
		Address: g.Addr,
		Connect: mqtt.Connect{Version: mqtt.V5, ClientID: "pump-7", CleanStart: true, Username: "pump-7", HasUsername: true, Password: []byte(secret), HasPassword: true},
		OnMessage: func(c *mqtt.Client, p *mqtt.Publish) {
			parts := strings.Split(string(p.Topic), "/") // cmd/pump-7/req/{id}/{name}
			_ = c.Queue(&mqtt.Publish{QoS: 0, Topic: []byte("cmd/pump-7/res/" + parts[3] + "/succeeded")})
			c.Flush()
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { c.Abort(); <-c.Done() }()
	if _, err := c.Subscribe(ctx, &mqtt.Subscribe{Filters: []mqtt.Subscription{{Filter: "cmd/pump-7/req/#", QoS: 1}}}); err != nil {
		t.Fatal(err)
	}

	b.run(chromedp.EmulateViewport(1200, 900), chromedp.Navigate(addr+"/devices"), chromedp.WaitVisible("#token"))
	b.check("sign in")
	b.run(chromedp.SendKeys("#token", "wrong token\n"), chromedp.WaitVisible("#refused"))
	began := time.Now()
	b.run(chromedp.SendKeys("#token", token+"\n"), chromedp.WaitVisible("body[data-ready=true]"))
	t.Logf("signed in and filled in %v", time.Since(began).Round(time.Millisecond))
	b.await("the device is in the list", `document.querySelector('#devices').textContent.includes('pump-7')`)
	b.check("devices")

	b.run(chromedp.Navigate(addr+"/"), chromedp.WaitVisible("body[data-ready=true]"))
	for n := range 50 {
		if err := c.Publish(&mqtt.Publish{QoS: 1, ID: uint16(n + 1), Topic: []byte("dt/a/pump-7/t"), Payload: fmt.Appendf(nil, `{"n":%d}`, n)}); err != nil {
			t.Fatal(err)
		}
	}
	b.await("the counters move", `document.querySelector('#facts').textContent.match(/Taken in[^0-9]*5\d/) !== null`)
	b.await("the charts are there", `document.querySelectorAll('.chart canvas').length === 2`)
	b.await("the ledger balances", `document.querySelector('#ledger').textContent.includes('exactly one account')`)
	b.check("overview")

	b.run(chromedp.Navigate(addr+"/devices/pump-7"), chromedp.WaitVisible("body[data-ready=true]"),
		chromedp.SendKeys(`#send [name=name]`, "flush"), chromedp.SendKeys(`#send [name=payload]`, `{"seconds": 5}`), chromedp.Click(`#send button`))
	b.await("the command succeeds", `document.querySelector('#commands').textContent.includes('SUCCEEDED')`)
	b.check("device")
	b.run(chromedp.Navigate(addr+"/messages"), chromedp.WaitVisible("body[data-ready=true]"))
	b.await("messages are shown", `document.querySelector('#messages').textContent.includes('"n":49')`)
	b.check("messages")
	b.run(chromedp.Navigate(addr+"/live"), chromedp.WaitVisible("body[data-ready=true]"),
		chromedp.SetValue(`#filter [name=filter]`, "dt/live/#"), chromedp.Click(`#filter button.main`))
	b.await("it is live", `document.querySelector('#link').textContent === 'live'`)
	for n, m := range []mqtt.Publish{
		{Topic: []byte("dt/a/pump-7/t"), Payload: []byte("not looked for")},
		{Topic: []byte("dt/live/1"), Payload: []byte(`{"t":[21.5]}`)},
		{Topic: []byte("dt/live/2"), Payload: []byte("\xa1\x61t\xf9\x4d\x60")},
		{Topic: []byte("dt/live/3"), Payload: []byte("<b>bold</b>")},
	} {
		m.QoS, m.ID = 1, uint16(100+n)
		if err := c.Publish(&m); err != nil {
			t.Fatal(err)
		}
	}
	b.await("the newest is shown first, as text", `document.querySelector('#tail tr').textContent.includes('<b>bold</b>')`)
	b.await("JSON and CBOR are readable", `(() => { const s = document.querySelector('#tail').textContent; return s.includes('21.5\n') && s.includes('CBOR: {"t": 21.5}') && !s.includes('looked'); })()`)
	b.check("live")
	b.run(chromedp.Navigate(addr+"/commands"), chromedp.WaitVisible("body[data-ready=true]"))
	b.await("commands are shown", `document.querySelector('#commands').textContent.includes('flush')`)
	b.check("commands")
	b.run(chromedp.Navigate(addr+"/parked"), chromedp.WaitVisible("body[data-ready=true]"))
	b.check("parked")
	b.run(chromedp.Navigate(addr+"/alarms"), chromedp.WaitVisible("body[data-ready=true]"))
	b.await("alarms are shown, or that there are none", `document.querySelector('#alarms').textContent.length > 0`)
	b.check("alarms")

	b.run(chromedp.EmulateViewport(360, 700), chromedp.Navigate(addr+"/"), chromedp.WaitVisible("body[data-ready=true]"))
	b.check("overview at 360 px")
	b.mu.Lock()
	for _, s := range b.said {
		t.Errorf("console: %s", s)
	}
	b.mu.Unlock()

	b.await("it is live", `document.querySelector('#link').textContent === 'live'`)
	g.Kill()
	b.await("it says that the gateway is away", `document.querySelector('#link').textContent.includes('away')`)
	g.Restart()
	b.run(chromedp.WaitVisible("#token")) // sessions are in memory
	var at string
	b.run(chromedp.Location(&at))
	if !strings.HasPrefix(at, addr+"/signin") {
		t.Errorf("after a restart the browser is at %s", at)
	}
}

// TestScreenshots makes the pictures in docs/screenshots: a dozen devices publish for two minutes, in the middle of which the link is cut.
func TestScreenshots(t *testing.T) {
	dir := os.Getenv("SCREENSHOTS")
	if dir == "" {
		t.Skip("make screenshots")
	}
	b := startBrowser(t, 5*time.Minute)
	up := testkit.StartMosquitto(t)
	link := testkit.StartProxy(t, up.Addr)
	g := startGated(t, testkit.GatewayConfig{
		Devices: "{ anonymous: true }",
		YAML:    fmt.Sprintf("upstreams: [{ name: cloud, url: %q }]\n", "mqtt://"+link.Addr()),
	})
	token, err := g.Token()
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	var devices sync.WaitGroup
	defer devices.Wait()
	defer stop()
	for d := range 12 {
		id := fmt.Sprintf("pump-%02d", d+1)
		c, err := mqtt.Dial(ctx, mqtt.ClientOptions{
			Address: g.Addr, Connect: mqtt.Connect{Version: mqtt.V5, ClientID: id, CleanStart: true},
			OnMessage: func(c *mqtt.Client, p *mqtt.Publish) {
				parts := strings.Split(string(p.Topic), "/")
				_ = c.Queue(&mqtt.Publish{QoS: 0, Topic: []byte("cmd/" + parts[1] + "/res/" + parts[3] + "/succeeded")})
				c.Flush()
			},
		})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Subscribe(ctx, &mqtt.Subscribe{Filters: []mqtt.Subscription{{Filter: "cmd/" + id + "/req/#", QoS: 1}}}); err != nil {
			t.Fatal(err)
		}
		devices.Go(func() {
			defer func() { c.Abort(); <-c.Done() }()
			tick := time.NewTicker(time.Duration(40+5*d) * time.Millisecond)
			defer tick.Stop()
			for n := 0; ; n++ {
				select {
				case <-ctx.Done():
					return
				case <-tick.C:
				}
				if err := c.Publish(&mqtt.Publish{
					QoS: 1, ID: uint16(n%60000 + 1), Topic: fmt.Appendf(nil, "dt/water/%s/pressure", id), Payload: fmt.Appendf(nil, `{"bar":%.2f,"n":%d}`, 4+float64((n*7+d*13)%50)/100, n),
				}); err != nil {
					return
				}
			}
		})
	}
	addr := "http://" + g.HTTP
	ready := chromedp.WaitVisible("body[data-ready=true]")
	b.run(chromedp.EmulateViewport(1200, 1000), chromedp.Navigate(addr+"/"), chromedp.WaitVisible("#token"), chromedp.SendKeys("#token", token+"\n"), ready)
	for _, step := range []struct {
		wait time.Duration
		cut  bool
	}{{45 * time.Second, true}, {30 * time.Second, false}, {45 * time.Second, false}} {
		<-time.After(step.wait)
		link.Set(testkit.Faults{Refuse: step.cut})
		if step.cut {
			link.Reset()
		}
	}
	b.run(chromedp.Reload(), ready)
	b.await("the charts are drawn", `document.querySelectorAll('.chart canvas').length === 2`)
	<-time.After(5 * time.Second) // two looks: rates
	b.shot(dir, "overview")
	b.run(chromedp.Navigate(addr+"/devices/pump-07"), ready, chromedp.SendKeys(`#send [name=name]`, "calibrate"), chromedp.SendKeys(`#send [name=payload]`, `{"offset": 0.02}`), chromedp.Click(`#send button`))
	b.await("the command succeeds", `document.querySelector('#commands').textContent.includes('SUCCEEDED')`)
	b.shot(dir, "device")
	b.run(chromedp.Navigate(addr+"/devices"), ready)
	b.shot(dir, "devices")
	b.run(chromedp.Navigate(addr+"/live"), ready, chromedp.SetValue(`#filter [name=filter]`, "dt/+/pump-07/#"), chromedp.Click(`#filter button.main`))
	b.await("messages come", `document.querySelectorAll('#tail tr').length > 5`)
	b.run(chromedp.Click("#stop"))
	b.shot(dir, "live")
	b.run(chromedp.EmulateViewport(360, 740), chromedp.Navigate(addr+"/"), ready)
	<-time.After(5 * time.Second)
	b.shot(dir, "overview-small")
}
