package devices

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// Identity is a device that was let in, or one that is known. It holds for one connection; what the device may do is
// one for all its identities and follows every change at once.
type Identity struct {
	e          *entry
	credential string // id of the one that fitted; "": a certificate that is not pinned, or none
	certified  bool   // let in by its certificate
	anonymous  bool   // let in without credentials
}

// Device is the client id.
func (i *Identity) Device() string { return i.e.id }

// Credential is the id of the credential that let it in; "": none, or a certificate that is not pinned.
func (i *Identity) Credential() string { return i.credential }

// Authenticated says whether it has shown a credential or a certificate that is its own; without, it came as
// devices.anonymous allows.
func (i *Identity) Authenticated() bool { return i.credential != "" || i.certified }

// MayPublish says whether it may publish to topic. It allocates nothing and follows changes of its role at once.
func (i *Identity) MayPublish(topic []byte) bool {
	role := i.e.role.Load()
	return role != nil && role.publish.allowsTopic(topic, i.e.own)
}

// MaySubscribe says whether it may subscribe to filter (without $share/name/), or get a message on the topic filter.
// It allocates nothing.
func (i *Identity) MaySubscribe(filter string) bool {
	role := i.e.role.Load()
	return role != nil && role.subscribe.allowsFilter(filter, i.e.own)
}

// Limits of the device now.
func (i *Identity) Limits() Limits {
	if role := i.e.role.Load(); role != nil {
		return role.limits
	}
	return Limits{}
}

// expires is when its credential expires; zero: never. i may be nil.
func (i *Identity) expires() time.Time {
	if i == nil || i.credential == "" {
		return time.Time{}
	}
	if d, _ := i.e.durable(); d != nil {
		if c := d.credential(i.credential); c != nil {
			return c.expires
		}
	}
	return time.Time{}
}

// Identity of a device that is not connecting now: of a session that is restored, of a will that waited. A device that is not
// known, or disabled, may nothing; under the anonymous rule one that is not known may what AnonymousRole may.
func (r *Registry) Identity(device string) *Identity {
	e, err := r.load(device)
	if err != nil {
		r.log.Warn("rights of device not read, it may nothing", "device", device, "err", err)
		e = r.entries.get(device)
	}
	return &Identity{e: e}
}

// Authenticate lets a client in or not: ErrCredentials, ErrDisabled, ErrBadID, ErrTooOften. It takes the same time for
// an unknown device as for a wrong password. A failure is answered late, the later the more there were from that
// address; the wait ends with ctx. The text of an error is for the log, it is not for the client.
//
// The rules: the client id is the device, and a user name, if there is one, has to say the same. A password that is
// not empty has to fit one of the device's tokens or passwords, whatever else is shown. Without one, a certificate
// (whose chain the caller has verified) lets in a device that it names; if the device has certificates pinned, it has
// to be one of them. Under the anonymous rule who is not registered, or registered itself, needs neither.
func (r *Registry) Authenticate(ctx context.Context, a *Attempt) (*Identity, error) {
	i, err := r.authenticate(ctx, a)
	result := loginError
	switch {
	case err == nil && i.anonymous:
		result = loginAnonymous
	case err == nil:
		result = loginOK
	case errors.Is(err, ErrTooOften):
		result = loginTooOften
	case errors.Is(err, ErrCredentials):
		result = loginCredentials
	case errors.Is(err, ErrDisabled):
		result = loginDisabled
	case errors.Is(err, ErrBadID):
		result = loginBadID
	}
	r.m.logins[result].Inc()
	return i, err
}

func (r *Registry) authenticate(ctx context.Context, a *Attempt) (*Identity, error) {
	addr, device := source(a.Address), a.Device
	if CheckID(device) != nil {
		device = "" // there is nothing to guess
	}
	if device != "" {
		if wait := r.guard.locked(addr, device); wait > 0 {
			return nil, fmt.Errorf("device %q: %w: too many failed logins from this address, the next is looked at in %v", device, ErrTooOften, wait.Round(time.Millisecond))
		}
	}
	i, err := r.judge(ctx, a)
	switch {
	case err == nil || errors.Is(err, ErrDisabled):
		if device != "" {
			r.guard.passed(addr, device)
		}
	case errors.Is(err, ErrCredentials) || errors.Is(err, ErrBadID):
		lock, tooMany := r.guard.failed(ctx, addr, device)
		if lock {
			r.log.Warn("logins of device held off for its failures", "device", device, "address", a.Address, "err", err)
		}
		if tooMany != nil {
			return nil, fmt.Errorf("%w; the last: %v", tooMany, err)
		}
	}
	if err != nil {
		return nil, err
	}
	if limit := i.Limits().ConnectsPerMinute; limit > 0 {
		if wait := r.guard.connect(i.e.id, limit); wait > 0 {
			return nil, fmt.Errorf("device %q: %w: its role allows %d connects per minute, the next in %v", i.e.id, ErrTooOften, limit, wait.Round(time.Millisecond))
		}
	}
	return i, nil
}

// judge says whether what a shows is right.
func (r *Registry) judge(ctx context.Context, a *Attempt) (*Identity, error) {
	anonymous := r.policy.Load().anonymous
	if a.HasUsername && a.Username != "" && a.Username != a.Device {
		return nil, fmt.Errorf("device %q: %w: it has to be its own user name, not %q", a.Device, ErrCredentials, a.Username)
	}
	if err := CheckID(a.Device); err != nil && !anonymous {
		return nil, err
	}
	e, err := r.load(a.Device)
	if err != nil {
		return nil, err
	}
	d, err := e.durable()
	if err != nil {
		return nil, fmt.Errorf("device %q: %w", a.Device, err)
	}
	if d != nil {
		r.entries.cache.touch(e)
	}
	i := &Identity{e: e}
	switch {
	case len(a.Password) > 0:
		c, err := r.check(ctx, d, a.Password, r.now(), func() error { return r.guard.crowded(source(a.Address)) })
		switch {
		case err != nil:
			return nil, fmt.Errorf("device %q: %w", a.Device, err)
		case c == nil && d == nil:
			return nil, fmt.Errorf("device %q: %w: it is not registered", a.Device, ErrCredentials)
		case c == nil:
			return nil, fmt.Errorf("device %q: %w: no token or password of it that is valid now", a.Device, ErrCredentials)
		}
		i.credential = c.id
	case a.Certificate != nil:
		names := certificateNames(a.Certificate)
		if !slices.Contains(names, a.Device) {
			return nil, fmt.Errorf("device %q: %w: the certificate names %s", a.Device, ErrCredentials, quoted(names))
		}
		switch {
		case d == nil || d.anonymous:
			if !anonymous {
				return nil, fmt.Errorf("device %q: %w: its certificate is good, but it is not registered", a.Device, ErrCredentials)
			}
			i.anonymous = true
		case d.has(kindCertificate):
			sum := fingerprint(a.Certificate)
			for c := range d.valid(kindCertificate, r.now()) {
				if slices.Equal(c.secret, sum[:]) {
					i.credential = c.id
				}
			}
			if i.credential == "" {
				return nil, fmt.Errorf("device %q: %w: its certificate, fingerprint %x, is not pinned, or no longer", a.Device, ErrCredentials, sum)
			}
			i.certified = true
		default:
			i.certified = true
		}
	case anonymous && (d == nil || d.anonymous):
		i.anonymous = true
	case d == nil:
		return nil, fmt.Errorf("device %q: %w: it is not registered and shows none", a.Device, ErrCredentials)
	default:
		return nil, fmt.Errorf("device %q: %w: it shows none", a.Device, ErrCredentials)
	}
	switch {
	case d != nil && !d.enabled:
		return nil, fmt.Errorf("device %q: %w", a.Device, ErrDisabled)
	case d != nil && e.role.Load() == nil:
		return nil, fmt.Errorf("device %q: %w: its role %q is no longer there, give it another or configure that one", a.Device, ErrDisabled, d.role)
	}
	return i, nil
}

func quoted(names []string) string {
	if len(names) == 0 {
		return "nobody"
	}
	q := make([]string, len(names))
	for i, name := range names {
		q[i] = fmt.Sprintf("%q", name)
	}
	return strings.Join(q, ", ")
}
