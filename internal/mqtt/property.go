package mqtt

import "iter"

// PropertyID names an MQTT 5 property (MQTT 5.0 §2.2.2.2).
type PropertyID byte

// The properties.
const (
	PropPayloadFormat         PropertyID = 0x01
	PropMessageExpiry         PropertyID = 0x02
	PropContentType           PropertyID = 0x03
	PropResponseTopic         PropertyID = 0x08
	PropCorrelationData       PropertyID = 0x09
	PropSubscriptionID        PropertyID = 0x0B
	PropSessionExpiry         PropertyID = 0x11
	PropAssignedClientID      PropertyID = 0x12
	PropServerKeepAlive       PropertyID = 0x13
	PropAuthMethod            PropertyID = 0x15
	PropAuthData              PropertyID = 0x16
	PropRequestProblemInfo    PropertyID = 0x17
	PropWillDelay             PropertyID = 0x18
	PropRequestResponseInfo   PropertyID = 0x19
	PropResponseInfo          PropertyID = 0x1A
	PropServerReference       PropertyID = 0x1C
	PropReasonString          PropertyID = 0x1F
	PropReceiveMaximum        PropertyID = 0x21
	PropTopicAliasMaximum     PropertyID = 0x22
	PropTopicAlias            PropertyID = 0x23
	PropMaximumQoS            PropertyID = 0x24
	PropRetainAvailable       PropertyID = 0x25
	PropUserProperty          PropertyID = 0x26
	PropMaximumPacketSize     PropertyID = 0x27
	PropWildcardAvailable     PropertyID = 0x28
	PropSubscriptionIDsAvail  PropertyID = 0x29
	PropSharedSubscriptsAvail PropertyID = 0x2A

	maxProperty = PropSharedSubscriptsAvail
)

// How a property's value is encoded.
type propKind byte

const (
	kindNone   propKind = iota // there is no such property
	kindBool                   // one byte, 0 or 1
	kindU16                    // two bytes
	kindU32                    // four bytes
	kindVarint                 // variable byte integer
	kindText                   // UTF-8 encoded string
	kindBinary                 // two bytes of length and as many of data
	kindPair                   // two UTF-8 encoded strings
)

// Where a property may stand: one bit for each packet type, and one for the will.
const inWill = 1 << 0

func in(types ...Type) (mask uint16) {
	for _, t := range types {
		mask |= 1 << t
	}
	return mask
}

// properties is the table of MQTT 5.0 §2.2.2.2.
var properties = [maxProperty + 1]struct {
	kind    propKind
	nonZero bool // 0 is a protocol error
	many    bool // may stand more than once; subscription identifiers only in PUBLISH
	in      uint16
}{
	PropPayloadFormat:         {kind: kindBool, in: in(TypePublish) | inWill},
	PropMessageExpiry:         {kind: kindU32, in: in(TypePublish) | inWill},
	PropContentType:           {kind: kindText, in: in(TypePublish) | inWill},
	PropResponseTopic:         {kind: kindText, in: in(TypePublish) | inWill},
	PropCorrelationData:       {kind: kindBinary, in: in(TypePublish) | inWill},
	PropSubscriptionID:        {kind: kindVarint, nonZero: true, in: in(TypePublish, TypeSubscribe)},
	PropSessionExpiry:         {kind: kindU32, in: in(TypeConnect, TypeConnack, TypeDisconnect)},
	PropAssignedClientID:      {kind: kindText, in: in(TypeConnack)},
	PropServerKeepAlive:       {kind: kindU16, in: in(TypeConnack)},
	PropAuthMethod:            {kind: kindText, in: in(TypeConnect, TypeConnack, TypeAuth)},
	PropAuthData:              {kind: kindBinary, in: in(TypeConnect, TypeConnack, TypeAuth)},
	PropRequestProblemInfo:    {kind: kindBool, in: in(TypeConnect)},
	PropWillDelay:             {kind: kindU32, in: inWill},
	PropRequestResponseInfo:   {kind: kindBool, in: in(TypeConnect)},
	PropResponseInfo:          {kind: kindText, in: in(TypeConnack)},
	PropServerReference:       {kind: kindText, in: in(TypeConnack, TypeDisconnect)},
	PropReasonString:          {kind: kindText, in: in(TypeConnack, TypePuback, TypePubrec, TypePubrel, TypePubcomp, TypeSuback, TypeUnsuback, TypeDisconnect, TypeAuth)},
	PropReceiveMaximum:        {kind: kindU16, nonZero: true, in: in(TypeConnect, TypeConnack)},
	PropTopicAliasMaximum:     {kind: kindU16, in: in(TypeConnect, TypeConnack)},
	PropTopicAlias:            {kind: kindU16, nonZero: true, in: in(TypePublish)},
	PropMaximumQoS:            {kind: kindBool, in: in(TypeConnack)},
	PropRetainAvailable:       {kind: kindBool, in: in(TypeConnack)},
	PropUserProperty:          {kind: kindPair, many: true, in: in(TypeConnect, TypeConnack, TypePublish, TypePuback, TypePubrec, TypePubrel, TypePubcomp, TypeSubscribe, TypeSuback, TypeUnsubscribe, TypeUnsuback, TypeDisconnect, TypeAuth) | inWill},
	PropMaximumPacketSize:     {kind: kindU32, nonZero: true, in: in(TypeConnect, TypeConnack)},
	PropWildcardAvailable:     {kind: kindBool, in: in(TypeConnack)},
	PropSubscriptionIDsAvail:  {kind: kindBool, in: in(TypeConnack)},
	PropSharedSubscriptsAvail: {kind: kindBool, in: in(TypeConnack)},
}

// MQTT 5.0 §2.2.2.2: a property that is unknown or not of its packet is malformed; twice, or
// with a value out of range, it is a protocol error.
var (
	errPropUnknown    = malformed("", "unknown property")
	errPropNotHere    = malformed("", "property is not allowed in this packet")
	errPropTwice      = violation("", "property stands twice")
	errPropBool       = violation("", "property that is 0 or 1 has another value")
	errPropReceiveMax = violation("", "receive maximum 0")
	errPropPacketSize = violation("", "maximum packet size 0")
	errPropSubID      = violation("", "subscription identifier 0")
	errPropAlias      = &Error{Reason: TopicAliasInvalid, Rule: "MQTT-3.3.2-8", Text: "topic alias 0"}
	errPropSubIDFrom  = violation("MQTT-3.3.4-6", "client sends a subscription identifier in PUBLISH")
	errResponseTopic  = &Error{Reason: TopicNameInvalid, Rule: "MQTT-3.3.2-14", Text: "response topic holds a wildcard or is empty"}
)

func zeroValue(id PropertyID) *Error {
	switch id {
	case PropReceiveMaximum:
		return errPropReceiveMax
	case PropMaximumPacketSize:
		return errPropPacketSize
	case PropTopicAlias:
		return errPropAlias
	default:
		return errPropSubID
	}
}

// Property is one property of a packet.
type Property struct {
	ID   PropertyID
	Int  uint32 // value of the kinds that are numbers
	Data []byte // value of strings and binary data; value of a user property
	Name []byte // name of a user property
}

// Properties are the properties of a parsed packet as they lie in the frame, without
// their length. They alias the frame. Only what the Parse functions have checked, or
// AppendUserProperty has made, is of use here.
type Properties []byte

// All gives the properties in the order of the packet.
func (p Properties) All() iter.Seq[Property] {
	return func(yield func(Property) bool) {
		r := reader{b: p}
		for len(r.b) > 0 {
			x := r.property()
			if r.err != nil || !yield(x) {
				return
			}
		}
	}
}

// User gives the user properties, name and value, in the order of the packet.
func (p Properties) User() iter.Seq2[[]byte, []byte] {
	return func(yield func(name, value []byte) bool) {
		for x := range p.All() {
			if x.ID == PropUserProperty && !yield(x.Name, x.Data) {
				return
			}
		}
	}
}

// AppendUserProperty appends a user property, so that what is in dst may be the Props of a
// packet to encode.
func AppendUserProperty[T text](dst []byte, name, value T) []byte {
	return appendText(appendText(append(dst, byte(PropUserProperty)), name), value)
}

// appendUser appends the user properties of p and leaves the others out: those come from
// the fields of their packet.
func appendUser(dst []byte, p Properties) []byte {
	r := reader{b: p}
	for len(r.b) > 0 {
		before := r.b
		x := r.property()
		if r.err != nil {
			break
		}
		if x.ID == PropUserProperty {
			dst = append(dst, before[:len(before)-len(r.b)]...)
		}
	}
	return dst
}

// userLen is the length of what appendUser appends.
func userLen(p Properties) (n int) {
	r := reader{b: p}
	for len(r.b) > 0 {
		before := len(r.b)
		if x := r.property(); r.err == nil && x.ID == PropUserProperty {
			n += before - len(r.b)
		}
	}
	return n
}

// property gives the next property, its value checked on its own.
func (r *reader) property() (x Property) {
	// The identifier is a variable byte integer, but none is above 0x2A (MQTT 5.0 §2.2.2.2).
	id := r.varint()
	if r.err != nil {
		return x
	}
	if id > uint32(maxProperty) || properties[id].kind == kindNone {
		r.fail(errPropUnknown)
		return x
	}
	x.ID = PropertyID(id)
	info := &properties[id]
	switch info.kind {
	case kindBool:
		x.Int = uint32(r.u8())
		if x.Int > 1 {
			r.fail(errPropBool)
		}
	case kindU16:
		x.Int = uint32(r.u16())
	case kindU32:
		x.Int = r.u32()
	case kindVarint:
		x.Int = r.varint()
	case kindText:
		x.Data = r.text()
	case kindBinary:
		x.Data = r.binary()
	case kindPair:
		x.Name = r.text()
		x.Data = r.text()
	case kindNone: // refused above
	}
	if info.nonZero && x.Int == 0 && r.err == nil {
		r.fail(zeroValue(x.ID))
	}
	return x
}

// properties begins the properties of a packet and gives a walk through them. Where mask is
// the bit of the packet (or inWill) in which they stand.
func (r *reader) properties(mask uint16) propWalk {
	raw := r.take(int(r.varint()))
	return propWalk{reader: reader{b: raw, err: r.err}, raw: raw, mask: mask}
}

type propWalk struct {
	reader
	raw  []byte
	mask uint16
	seen uint64 // one bit for each property
}

// next gives the next property, and false at the end or after an error.
func (w *propWalk) next() (Property, bool) {
	if len(w.b) == 0 {
		return Property{}, false
	}
	x := w.property()
	if w.err != nil {
		return Property{}, false
	}
	info := &properties[x.ID]
	if info.in&w.mask == 0 {
		w.fail(errPropNotHere)
		return Property{}, false
	}
	bit := uint64(1) << x.ID
	many := info.many || x.ID == PropSubscriptionID && w.mask&(1<<TypePublish) != 0
	if w.seen&bit != 0 && !many {
		w.fail(errPropTwice)
		return Property{}, false
	}
	w.seen |= bit
	return x, true
}

// into ends the walk: its error becomes r's.
func (w *propWalk) into(r *reader) Properties {
	if w.err != nil {
		r.fail(w.err)
		return nil
	}
	return w.raw
}

// skip checks the properties of a packet of which none but generic ones are looked at.
func (r *reader) skipProperties(mask uint16) (raw Properties, reasonString []byte) {
	w := r.properties(mask)
	for {
		x, ok := w.next()
		if !ok {
			return w.into(r), reasonString
		}
		if x.ID == PropReasonString {
			reasonString = x.Data
		}
	}
}

func appendU16Prop(dst []byte, id PropertyID, x uint16) []byte {
	return append(dst, byte(id), byte(x>>8), byte(x))
}

func appendU32Prop(dst []byte, id PropertyID, x uint32) []byte {
	return append(dst, byte(id), byte(x>>24), byte(x>>16), byte(x>>8), byte(x))
}

func appendTextProp[T text](dst []byte, id PropertyID, x T) []byte {
	return appendText(append(dst, byte(id)), x)
}
