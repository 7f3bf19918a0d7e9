package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"holdfast/gateway/httpapi"
	"holdfast/internal/config"
)

const (
	apiArgs = "[--config FILE | --address HOST:PORT] [--token-file FILE]"
	apiHelp = `The gateway is asked over HTTP: at --address (HOST:PORT, or the URL of a proxy before it), or at http.address of
--config, or at 127.0.0.1:8080. The token that it asks for is read from --token-file, or the environment's
HOLDFAST_TOKEN, or DATA_DIR/admin.token, which is there on the gateway's own machine.`

	tokenVariable = "HOLDFAST_TOKEN"
	callTimeout   = 30 * time.Second
	maxAnswer     = 64 << 20
)

// apiFlags are the flags of every command that asks a gateway.
type apiFlags struct{ config, address, tokenFile string }

func apiFlagsIn(fs *flag.FlagSet) *apiFlags {
	var f apiFlags
	fs.StringVar(&f.config, "config", "", "configuration `FILE` of the gateway")
	fs.StringVar(&f.address, "address", "", "`HOST:PORT` of its HTTP API")
	fs.StringVar(&f.tokenFile, "token-file", "", "`FILE` with the token to show")
	return &f
}

// asks parses args, as program.parse does, and gives who is to be asked.
func (f *apiFlags) asks(p *program, fs *flag.FlagSet, args []string, least, most int) (c *apiClient, words []string, err error) {
	if words, err = p.parse(fs, args, least, most); err != nil {
		return nil, nil, err
	}
	c, err = f.client()
	return c, words, err
}

// apiClient asks one gateway. Many goroutines may use it.
type apiClient struct {
	base     string // http://127.0.0.1:8080
	token    string // "": none
	tokenWay string // where the token came from, or why there is none
	http     http.Client
}

// client finds the gateway and the token for it.
func (f *apiFlags) client() (*apiClient, error) {
	dataDir := ""
	switch {
	case f.address != "" && f.config != "":
		return nil, usagef("--config and --address exclude each other")
	case f.address == "":
		cfg, _, err := load(f.config)
		if err != nil {
			return nil, err
		}
		if cfg.HTTP.Address == "" {
			return nil, fmt.Errorf("%s has no http.address: there is nobody to ask", f.config)
		}
		f.address, dataDir = cfg.HTTP.Address, cfg.Gateway.DataDir
	}
	base, local, err := apiBase(f.address)
	if err != nil {
		return nil, err
	}
	if dataDir == "" && local {
		cfg, err := config.Default()
		if err != nil {
			return nil, err
		}
		dataDir = cfg.Gateway.DataDir
	}
	c := &apiClient{base: base, http: http.Client{
		Transport: &http.Transport{
			Proxy: nil, MaxIdleConnsPerHost: importWorkers, IdleConnTimeout: time.Minute, ResponseHeaderTimeout: callTimeout,
			DialContext: (&net.Dialer{Timeout: 10 * time.Second}).DialContext, TLSHandshakeTimeout: 10 * time.Second,
		},
		// A token is for who was asked, not for whom that one names.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
	return c, c.findToken(f.tokenFile, dataDir)
}

// apiBase makes a URL of what people write. local: it is this machine.
func apiBase(address string) (base string, local bool, err error) {
	scheme := "http"
	if strings.Contains(address, "://") {
		u, err := url.Parse(address)
		if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
			return "", false, usagef("--address %q is neither HOST:PORT nor a URL such as https://gateway.example.com", address)
		}
		if strings.Trim(u.Path, "/") != "" || u.Port() == "" {
			return strings.TrimRight(u.Scheme+"://"+u.Host+u.Path, "/"), config.Loopback(net.JoinHostPort(u.Hostname(), "0")), nil
		}
		scheme, address = u.Scheme, u.Host
	}
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return "", false, usagef("--address %q is not HOST:PORT", address)
	}
	if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
		host = "127.0.0.1" // it listens everywhere, here too
	}
	address = net.JoinHostPort(host, port)
	return scheme + "://" + address, config.Loopback(address), nil
}

// findToken reads the token. That none is there is no error yet: the gateway says whether it wants one.
func (c *apiClient) findToken(file, dataDir string) error {
	switch {
	case file != "":
		token, err := readToken(file)
		if err != nil {
			return usageError{fmt.Sprintf("--token-file: %v", err)}
		}
		c.token, c.tokenWay = token, file
	case os.Getenv(tokenVariable) != "":
		token := strings.TrimSpace(os.Getenv(tokenVariable))
		if !tokenLike(token) {
			return usagef("what %s holds is not a token: one line of ASCII characters", tokenVariable)
		}
		c.token, c.tokenWay = token, "the environment's "+tokenVariable
	case dataDir != "":
		path := filepath.Join(dataDir, "admin.token")
		token, err := readToken(path)
		if err != nil {
			c.tokenWay = err.Error()
			return nil
		}
		c.token, c.tokenWay = token, path
	default:
		c.tokenWay = "it is another machine, so the token of a gateway here is not shown to it"
	}
	return nil
}

func readToken(file string) (string, error) {
	f, err := os.Open(file)
	if err != nil {
		var pe *fs.PathError
		if errors.As(err, &pe) {
			err = pe.Err
		}
		return "", fmt.Errorf("%s cannot be read: %w", file, err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, 4<<10))
	if err != nil {
		return "", fmt.Errorf("%s cannot be read: %w", file, err)
	}
	token := strings.TrimSpace(string(b))
	if !tokenLike(token) {
		return "", fmt.Errorf("%s does not hold a token: one line of ASCII characters", file)
	}
	return token, nil
}

func tokenLike(s string) bool {
	return s != "" && !strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r > '~' })
}

// apiError is what a gateway refused with.
type apiError struct {
	status     int
	code       string
	message    string
	retryAfter time.Duration
	way        string // what to do about it
}

func (e *apiError) Error() string {
	if e.way != "" {
		return e.message + "\n" + e.way
	}
	return e.message
}

// refused says whether err is a refusal with one of the codes.
func refused(err error, codes ...string) bool {
	var e *apiError
	if !errors.As(err, &e) {
		return false
	}
	for _, c := range codes {
		if e.code == c {
			return true
		}
	}
	return false
}

// call sends body (nil: none) as JSON and decodes the answer into out (nil: not wanted).
func (c *apiClient) call(ctx context.Context, method, path string, body, out any) error {
	var b []byte
	if body != nil {
		var err error
		if b, err = json.Marshal(body); err != nil {
			return err
		}
	}
	answer, err := c.raw(ctx, method, path, b)
	if err != nil || out == nil {
		return err
	}
	if err := json.Unmarshal(answer, out); err != nil {
		return fmt.Errorf("answer of %s is not that of a holdfast: %w", c.base, err)
	}
	return nil
}

// raw sends body, which is JSON or nil, and gives the answer's body.
func (c *apiClient) raw(ctx context.Context, method, path string, body []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	req, err := c.request(ctx, method, path, body)
	if err != nil {
		return nil, err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, c.unreachable(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return nil, fmt.Errorf("ask %s: %w", c.base, err)
	}
	if resp.StatusCode/100 != 2 {
		return nil, c.refusal(resp, b)
	}
	return b, nil
}

// stream sends body (nil: none) as JSON and gives the answer to be read; a silence of more than maxSilence ends it.
func (c *apiClient) stream(ctx context.Context, method, path string, body any) (io.ReadCloser, error) {
	var b []byte
	if body != nil {
		var err error
		if b, err = json.Marshal(body); err != nil {
			return nil, err
		}
	}
	ctx, cancel := context.WithCancel(ctx)
	req, err := c.request(ctx, method, path, b)
	if err != nil {
		cancel()
		return nil, err
	}
	patient := c.http
	if t, ok := c.http.Transport.(*http.Transport); ok {
		t = t.Clone()
		t.ResponseHeaderTimeout = 10 * time.Minute // where nothing can be linked, a backup is copied first
		t.DisableKeepAlives = true
		patient.Transport = t
	}
	resp, err := patient.Do(req)
	if err != nil {
		cancel()
		return nil, c.unreachable(err)
	}
	if resp.StatusCode/100 != 2 {
		defer cancel()
		defer resp.Body.Close()
		told, _ := io.ReadAll(io.LimitReader(resp.Body, 64<<10)) // what cannot be read is not told
		return nil, c.refusal(resp, told)
	}
	return &watchedBody{c: c, body: resp.Body, cancel: cancel, silence: time.AfterFunc(maxSilence, cancel)}, nil
}

// watchedBody ends when nothing comes for too long.
type watchedBody struct {
	c       *apiClient
	body    io.ReadCloser
	cancel  context.CancelFunc
	silence *time.Timer
}

func (w *watchedBody) Read(b []byte) (int, error) {
	n, err := w.body.Read(b)
	w.silence.Reset(maxSilence)
	if err != nil && !errors.Is(err, io.EOF) {
		err = fmt.Errorf("%s ended its answer in the middle: %w", w.c.base, err)
	}
	return n, err
}

func (w *watchedBody) Close() error {
	w.silence.Stop()
	w.cancel()
	return w.body.Close()
}

func (c *apiClient) request(ctx context.Context, method, path string, body []byte) (*http.Request, error) {
	var r io.Reader
	if body != nil {
		r = bytes.NewReader(body)
	}
	req, err := http.NewRequestWithContext(ctx, method, c.base+path, r)
	if err != nil {
		return nil, err
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	if c.token != "" {
		req.Header.Set("Authorization", "Bearer "+c.token)
	}
	return req, nil
}

// unreachableError is a gateway that cannot be reached, or that was lost before it answered.
type unreachableError struct {
	text   string
	nobody bool // nobody listens there
}

func (e unreachableError) Error() string { return e.text }

func (c *apiClient) unreachable(err error) error {
	var dns *net.DNSError
	where := strings.TrimPrefix(c.base, "http://")
	switch {
	case errors.Is(err, context.Canceled):
		return err
	case errors.Is(err, syscall.ECONNREFUSED):
		return unreachableError{fmt.Sprintf("no gateway answers at %s: start one with holdfast run, or say where it is with --address or --config", where), true}
	case errors.As(err, &dns):
		return unreachableError{text: fmt.Sprintf("there is no host %s: say where the gateway is with --address or --config", dns.Name)}
	}
	var ue *url.Error
	if errors.As(err, &ue) {
		err = ue.Err
	}
	return unreachableError{text: fmt.Sprintf("ask %s: %v", where, err)}
}

// refusal makes an error of an answer that is none.
func (c *apiClient) refusal(resp *http.Response, body []byte) error {
	e := &apiError{status: resp.StatusCode}
	var told httpapi.Error
	if json.Unmarshal(body, &told) == nil && told.Error.Message != "" {
		e.code, e.message = told.Error.Code, told.Error.Message
	} else {
		e.message = fmt.Sprintf("%s answers %s: is that a holdfast?", c.base, resp.Status)
	}
	if s, err := strconv.Atoi(resp.Header.Get("Retry-After")); err == nil && s > 0 {
		e.retryAfter = time.Duration(s) * time.Second
	}
	switch {
	case e.status == http.StatusUnauthorized && c.token == "":
		e.way = fmt.Sprintf("no token was shown (%s): run this as the gateway's user, or pass --token-file or %s", c.tokenWay, tokenVariable)
	case e.status == http.StatusUnauthorized:
		e.way = fmt.Sprintf("the token of %s was shown: the gateway does not know it, or not any more; make one with holdfast token add, and pass --token-file", c.tokenWay)
	case e.status == http.StatusForbidden && c.token != "":
		e.way = fmt.Sprintf("the token of %s was shown: pass one of a higher role with --token-file", c.tokenWay)
	case e.status/100 == 3:
		e.message = fmt.Sprintf("%s sends on to %q: give that as --address", c.base, resp.Header.Get("Location"))
	}
	return e
}

// events follows what happens, from the event after lastID ("": from now on), until fn returns an error, ctx ends or the
// stream does. opened is called when events can no longer be missed. The error of a stream that ended is unreachableError.
func (c *apiClient) events(ctx context.Context, query url.Values, lastID string, opened func(), fn func(httpapi.Event) error) error {
	path := "/api/v1/events"
	if len(query) > 0 {
		path += "?" + query.Encode()
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	req, err := c.request(ctx, http.MethodGet, path, nil)
	if err != nil {
		return err
	}
	req.Header.Set("Accept", "text/event-stream")
	if lastID != "" {
		req.Header.Set("Last-Event-ID", lastID)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return c.unreachable(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		b, _ := io.ReadAll(io.LimitReader(resp.Body, 64<<10)) // what cannot be read is not told
		return c.refusal(resp, b)
	}
	if mime, _, _ := strings.Cut(resp.Header.Get("Content-Type"), ";"); strings.TrimSpace(mime) != "text/event-stream" {
		return fmt.Errorf("%s answers with %q instead of events: is that a holdfast?", c.base, mime)
	}
	opened()
	// Somebody who is cut off silently would wait for ever: a server sends at least a comment now and then.
	silence := time.AfterFunc(maxSilence, cancel)
	defer silence.Stop()
	s := bufio.NewScanner(resp.Body)
	s.Buffer(nil, 4<<20)
	var data []byte
	var id string
	for s.Scan() {
		silence.Reset(maxSilence)
		line := s.Text()
		if line == "" { // the end of one (WHATWG HTML §9.2.6)
			if len(data) > 0 {
				var ev httpapi.Event
				if err := json.Unmarshal(data, &ev); err != nil {
					return fmt.Errorf("event of %s cannot be read: %w", c.base, err)
				}
				if ev.ID == "" {
					ev.ID = id
				}
				if err := fn(ev); err != nil {
					return err
				}
			}
			data = nil
			continue
		}
		field, value, _ := strings.Cut(line, ":")
		value = strings.TrimPrefix(value, " ")
		switch field {
		case "data":
			if data != nil {
				data = append(data, '\n')
			}
			data = append(data, value...)
		case "id":
			id = value
		}
	}
	if err := s.Err(); err != nil && ctx.Err() == nil {
		return c.unreachable(err)
	}
	return unreachableError{text: fmt.Sprintf("%s ended the stream of events", c.base)}
}

// maxSilence is how long a stream of events may say nothing, not even that it is still there.
const maxSilence = 90 * time.Second

// follow is events without an end: it comes back to a gateway that was lost and goes on where it was. lost is called when
// a stream is lost, back when there is one again. It returns fn's error, ctx's, or that of a gateway that refuses.
func (c *apiClient) follow(ctx context.Context, query url.Values, back func(), lost func(error), fn func(httpapi.Event) error) error {
	last, delay := "", followDelay
	for {
		err := c.events(ctx, query, last, func() { delay = followDelay; back() }, func(ev httpapi.Event) error {
			if ev.ID != "" {
				last = ev.ID
			}
			return fn(ev)
		})
		var gone unreachableError
		var refusal *apiError
		again := errors.As(err, &gone) || errors.As(err, &refusal) && (refusal.status >= 500 || refusal.status == http.StatusTooManyRequests)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if !again {
			return err
		}
		lost(err)
		wait := delay
		if refusal != nil {
			wait = max(wait, refusal.retryAfter)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(wait):
		}
		delay = min(2*delay, 5*time.Second)
	}
}

const followDelay = 200 * time.Millisecond
