package main

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"holdfast/internal/testkit"
)

// The slow link: its rate as the wire counts it, and of a hundred packets how many are lost, each way.
const (
	slowRate = 50_000 / 8 // bytes a second
	slowLoss = 1
)

// linkResult is how a gateway did on a slow link.
type linkResult struct {
	Baseline []float64 // bytes a second that one plain TCP connection carries, measured just before and just after
	Useful   float64   // bytes a second that came up the gateway's connection
	Acked    float64   // messages a second
	Losses   float64   // of the link, while it was measured
	Seconds  float64
}

// measureLink drains a backlog over a link of 50 kbit/s that loses 1 % of the packets, and over one that loses none, which
// needs no root.
func measureLink(ctx context.Context, c config, s *section) error {
	s.notes = append(s.notes, fmt.Sprintf("A backlog of incompressible messages for %v. Useful are the bytes that mosquitto reads. On the lossy link (two network namespaces, tbf both ways, "+
		"%d of 100 packets dropped at random at each end), and on one through a slow proxy, they are held against one plain TCP connection on the same link just before and after.",
		c.link, slowLoss))
	if why := noNamespaces(ctx); why != "" {
		s.notes = append(s.notes, "The lossy link was not measured: "+why+".")
	} else if err := measureLossy(ctx, c, s); err != nil {
		return err
	}
	c.link = min(c.link, time.Minute) // nothing is left to chance here
	return round(c.dir, func(e *env) {
		up := testkit.StartMosquitto(e)
		slow := testkit.Faults{BytesPerSecond: slowRate, Latency: 100 * time.Millisecond}
		proxy := testkit.StartProxy(e, up.Addr)
		proxy.Set(slow)
		addr := testkit.FreeAddr(e)
		testkit.Start(e, testkit.Command{Name: "sink", Path: c.self, Args: []string{"sink", addr}})
		other := testkit.StartProxy(e, addr) // a proxy that a busy machine wakes late carries less than it says
		other.Set(slow)
		plain := func() float64 {
			v, err := plainTCP(ctx, other.Addr(), min(c.link, 30*time.Second))
			if err != nil {
				e.Fatalf("plain TCP through the proxy: %v", err)
			}
			return v
		}
		before := plain()
		r := drainSlowly(ctx, e, c, proxy.Addr(), func() float64 { return float64(proxy.Traffic().Up) })
		s.rows = append(s.rows,
			row{what: "50 kbit/s, 100 ms each way, no loss, `batch`", value: sample{r.Useful}, unit: "B/s", than: "one TCP connection", against: sample{before, plain()}, target: atLeast(0.9, "×")},
			row{what: "the same: links lost", value: sample{r.Losses}, unit: "", target: atMost(0, "")},
		)
	})
}

func measureLossy(ctx context.Context, c config, s *section) error {
	r, err := inNamespaces(ctx, c)
	if err != nil {
		return err
	}
	what := fmt.Sprintf("50 kbit/s with %d %% loss, `batch`, %.0f s", slowLoss, r.Seconds)
	s.rows = append(s.rows,
		row{what: what, value: sample{r.Useful}, unit: "B/s", than: "one TCP connection", against: r.Baseline, target: atLeast(0.9, "×")},
		row{what: what + ": links lost", value: sample{r.Losses}, unit: "", target: atMost(0, "")},
		row{what: what + ": messages of 256 B", value: sample{r.Acked}, unit: "msg/s"},
	)
	return nil
}

// noNamespaces says why there can be no network namespaces here, or "".
func noNamespaces(ctx context.Context) string {
	if os.Geteuid() != 0 {
		return "network namespaces need root"
	}
	for _, tool := range []string{"ip", "tc", "nft"} {
		if _, err := exec.LookPath(tool); err != nil {
			return tool + " is not installed (Debian: iproute2, nftables)"
		}
	}
	n := namespaces{suffix: fmt.Sprintf("%d-try", os.Getpid())}
	defer n.remove()
	if err := n.make(ctx); err != nil {
		return err.Error()
	}
	return ""
}

// namespaces are two, with the slow link between them.
type namespaces struct{ suffix string }

const (
	nearIP = "10.231.7.1"
	farIP  = "10.231.7.2"
)

func (n namespaces) near() string { return "holdfast-near-" + n.suffix }
func (n namespaces) far() string  { return "holdfast-far-" + n.suffix }

func (n namespaces) make(ctx context.Context) error {
	steps := [][]string{
		{"ip", "netns", "add", n.near()},
		{"ip", "netns", "add", n.far()},
		{"ip", "-n", n.near(), "link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", n.far()},
	}
	for _, e := range []struct{ ns, ip string }{{n.near(), nearIP}, {n.far(), farIP}} {
		in := []string{"ip", "netns", "exec", e.ns}
		steps = append(
			steps,
			[]string{"ip", "-n", e.ns, "address", "add", e.ip + "/24", "dev", "wire"},
			[]string{"ip", "-n", e.ns, "link", "set", "lo", "up"},
			[]string{"ip", "-n", e.ns, "link", "set", "wire", "gso_max_segs", "1", "up"}, // packets as a modem would see them
			[]string{"tc", "-n", e.ns, "qdisc", "add", "dev", "wire", "root", "tbf", "rate", fmt.Sprint(slowRate * 8), "burst", "3200", "latency", "2s"},
			append(in, "nft", "add table inet loss; add chain inet loss in { type filter hook input priority 0; }; "+
				fmt.Sprintf("add rule inet loss in iifname wire numgen random mod 100 < %d drop", slowLoss)),
		)
	}
	for _, args := range steps {
		if out, err := exec.CommandContext(ctx, args[0], args[1:]...).CombinedOutput(); err != nil { //nolint:gosec // the commands above
			return fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(string(out)))
		}
	}
	return nil
}

func (n namespaces) remove() {
	for _, ns := range []string{n.near(), n.far()} {
		_ = exec.CommandContext(context.WithoutCancel(context.Background()), "ip", "netns", "del", ns).Run() //nolint:gosec // one that is not there is gone
	}
}

// inNamespaces runs this program again at the near end of the link.
func inNamespaces(ctx context.Context, c config) (r linkResult, err error) {
	n := namespaces{suffix: fmt.Sprint(os.Getpid())}
	defer n.remove()
	if err := n.make(ctx); err != nil {
		return r, err
	}
	bin, err := filepath.Abs(c.bin)
	if err != nil {
		return r, err
	}
	cmd := exec.CommandContext(ctx, "ip", "netns", "exec", n.near(), c.self, "link", "-bin", bin, "-far", n.far(), "-dir", c.dir, "-link", c.link.String()) //nolint:gosec // ourselves
	cmd.Stderr = c.log
	out, err := cmd.Output()
	if err != nil {
		return r, fmt.Errorf("at the near end of the link: %w", err)
	}
	return r, json.Unmarshal(out, &r)
}

// nearEnd is this program at the near end of the link: it prints a linkResult.
func nearEnd(ctx context.Context, args []string, out, log io.Writer) error {
	flags := flag.NewFlagSet("link", flag.ContinueOnError)
	c := config{log: log}
	flags.StringVar(&c.bin, "bin", "", "")
	flags.StringVar(&c.dir, "dir", "", "")
	flags.DurationVar(&c.link, "link", time.Minute, "")
	far := flags.String("far", "", "")
	if err := flags.Parse(args); err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	var r linkResult
	if err := round(c.dir, func(e *env) {
		const port = "1883"
		file := filepath.Join(e.TempDir(), "mosquitto.conf")
		conf := "allow_anonymous true\nuser root\nlog_dest stderr\nmax_queued_messages 0\nlistener " + port + " " + farIP + "\n"
		if err := os.WriteFile(file, []byte(conf), 0o600); err != nil {
			e.Fatalf("write mosquitto's configuration: %v", err)
		}
		mosquitto, err := exec.LookPath("mosquitto")
		if err != nil {
			mosquitto = "/usr/sbin/mosquitto"
		}
		up := testkit.Start(e, testkit.Command{Name: "mosquitto", Path: "ip", Args: []string{"netns", "exec", *far, mosquitto, "-c", file}, Ready: " running"})
		testkit.Start(e, testkit.Command{Name: "sink", Path: "ip", Args: []string{"netns", "exec", *far, self, "sink", farIP + ":9000"}})
		plain := func() float64 {
			v, err := plainTCP(ctx, farIP+":9000", min(c.link, time.Minute))
			if err != nil {
				e.Fatalf("plain TCP over the link: %v", err)
			}
			fmt.Fprintf(log, "one plain TCP connection carries %.0f B/s\n", v)
			return v
		}
		before := plain()
		r = drainSlowly(ctx, e, c, farIP+":"+port, func() float64 { return float64(received(up.PID())) })
		r.Baseline = []float64{before, plain()}
	}); err != nil {
		return err
	}
	return json.NewEncoder(out).Encode(r)
}

// drainSlowly lets a gateway send a backlog, to which alarms are added, over a slow link. came tells how many bytes have come up so far.
func drainSlowly(ctx context.Context, e *env, c config, upstream string, came func() float64) linkResult {
	x := startGateway(e, c, upstream, "batch")
	enough := int64(float64(slowRate)*(c.link+2*time.Minute).Seconds()) / payloadBytes
	if _, err := runLoad(ctx, load{addr: x.addr, conns: 4, window: 100, qos: 1, limit: enough, payloads: noise(8192)}, 0); err != nil {
		e.Fatalf("fill: %v", err)
	}
	look := func() (bytes, acked, losses float64, at time.Time) {
		st, err := x.gateway.Status()
		if err != nil || len(st.Upstreams) != 1 {
			e.Fatalf("ask the gateway: %v", err)
		}
		if losses, err = x.gateway.Metric("holdfast_bridge_link_losses_total"); err != nil {
			losses = 0 // none yet: no label, no sample
		}
		return came(), float64(st.Upstreams[0].Acked), losses, time.Now()
	}
	pause := func(d time.Duration) {
		select {
		case <-time.After(d):
		case <-ctx.Done():
			e.Fatalf("%v", ctx.Err())
		}
	}
	pause(min(20*time.Second, c.link)) // the window finds the link
	bytes, acked, losses, began := look()
	for left := c.link; left > 0; left -= time.Minute {
		pause(min(left, time.Minute))
		b, a, l, at := look()
		d := at.Sub(began).Seconds()
		fmt.Fprintf(c.log, "after %3.0f s: %.0f B/s, %.1f messages/s acknowledged, %.0f links lost\n", d, (b-bytes)/d, (a-acked)/d, l-losses)
	}
	b, a, l, at := look()
	d := at.Sub(began).Seconds()
	x.Kill() // what follows on the link is not to share it
	return linkResult{Useful: (b - bytes) / d, Acked: (a - acked) / d, Losses: l - losses, Seconds: d}
}

// plainTCP tells how many bytes a second one TCP connection carries to a sink.
func plainTCP(ctx context.Context, addr string, d time.Duration) (float64, error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", addr)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0) // what the kernel still holds is not to share the link with what is measured next
	}
	if err := binary.Write(conn, binary.BigEndian, int64(d)); err != nil {
		return 0, err
	}
	go func() { // until the sink has enough
		buf := make([]byte, 4096)
		for {
			if _, err := conn.Write(buf); err != nil {
				return
			}
		}
	}()
	var n int64
	err = binary.Read(conn, binary.BigEndian, &n)
	return float64(n) / d.Seconds(), err
}

// serveSink counts what each connection brings in the time that it asks for, tells it, and closes.
func serveSink(ctx context.Context, args []string, log io.Writer) error {
	if len(args) != 1 {
		return errors.New("sink ADDRESS")
	}
	ln, err := (&net.ListenConfig{}).Listen(ctx, "tcp", args[0])
	if err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { _ = ln.Close() })()
	fmt.Fprintln(log, "msg=ready")
	for {
		conn, err := ln.Accept()
		if err != nil {
			return nil //nolint:nilerr // it is asked to end
		}
		go func() {
			if err := sink(conn); err != nil {
				fmt.Fprintln(log, "sink:", err)
			}
		}()
	}
}

func sink(conn net.Conn) error {
	defer conn.Close()
	var d int64
	if err := binary.Read(conn, binary.BigEndian, &d); err != nil {
		return err
	}
	_ = conn.SetReadDeadline(time.Now().Add(time.Duration(d)))
	n, err := io.Copy(io.Discard, conn)
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		return fmt.Errorf("after %d bytes: %w", n, err)
	}
	if err := binary.Write(conn, binary.BigEndian, n); err != nil {
		return err
	}
	// Closed with bytes unread it would be reset, and the answer lost with it.
	_ = conn.SetReadDeadline(time.Now().Add(time.Minute))
	_, _ = io.Copy(io.Discard, conn)
	return nil
}
